// The exported functions of libnvinfer, libnvinfer_plugin and libnvonnxparser, SIMULATED: this is not TensorRT.
//
// NVIDIA's Python bindings link against these. Each hands over to the Python module simulated_tensorrt.entry, which
// lives in the same process and answers with an object whose virtual functions are Python methods. The few functions of
// CPython are declared by hand, so that no header but the compiler's own is needed.
#include <cstdint>
#include <cstdio>
#include <typeinfo>

#define API extern "C" __attribute__((visibility("default")))

struct PyObject;
extern "C" {
int PyGILState_Ensure();
void PyGILState_Release(int);
PyObject* PyImport_ImportModule(const char*);
PyObject* PyObject_CallMethod(PyObject*, const char*, const char*, ...);
void* PyLong_AsVoidPtr(PyObject*);
PyObject* PyErr_Occurred();
void PyErr_Print();
void Py_DecRef(PyObject*);
}

namespace {

void* ask(const char* function, void* first = nullptr, void* second = nullptr)
{
    int const state = PyGILState_Ensure();
    void* answer = nullptr;
    if (PyObject* module = PyImport_ImportModule("simulated_tensorrt.entry")) {
        if (PyObject* result = PyObject_CallMethod(module, function, "KK", reinterpret_cast<unsigned long long>(first),
                reinterpret_cast<unsigned long long>(second))) {
            answer = PyLong_AsVoidPtr(result);
            Py_DecRef(result);
        }
        Py_DecRef(module);
    }
    if (PyErr_Occurred()) {
        std::fprintf(stderr, "SIMULATED TensorRT: %s failed\n", function);
        PyErr_Print();
        answer = nullptr;
    }
    PyGILState_Release(state);
    return answer;
}

} // namespace

// ------------------------------------------------------------------------------------------------ libnvinfer

API void* createInferBuilder_INTERNAL(void* logger, int32_t) { return ask("create_builder", logger); }
API void* createInferRuntime_INTERNAL(void* logger, int32_t) { return ask("create_runtime", logger); }
API void* createInferRefitter_INTERNAL(void*, void*, int32_t) { return nullptr; }
API void* getBuilderPluginRegistry(int32_t) { return nullptr; }
API void* getPluginRegistry() { return nullptr; }
API void* getLogger() { return nullptr; }
API int32_t getInferLibVersion() { return SIMULATED_VERSION; }

struct Polymorphic {
    virtual ~Polymorphic() {}
};

// What the bindings look at when they ask for the class of an object.
API void const* trtsim_typeinfo() { return &typeid(Polymorphic); }

// Takes the place of the destructors when the interpreter ends.
API void trtsim_nothing(void*) {}

// ------------------------------------------------------------------------- libnvinfer_plugin, libnvonnxparser

API bool initLibNvInferPlugins(void*, const char*) { return true; }
API void* createNvOnnxParser_INTERNAL(void* network, void* logger, int)
{
    return ask("create_parser", network, logger);
}
API void* createNvOnnxParserRefitter_INTERNAL(void*, void*, int32_t) { return nullptr; }
API int getNvOnnxParserVersion() { return 100; }
