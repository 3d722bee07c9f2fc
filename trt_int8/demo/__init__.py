"""The demo: scikit-learn's handwritten digits, a small residual network, and the files that a run starts from."""
