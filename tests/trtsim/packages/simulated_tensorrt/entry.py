"""What the exported C functions call; see nvinfer.cpp. SIMULATED."""

from __future__ import annotations

from simulated_tensorrt.abi import VERSION, Logger, simulated
from simulated_tensorrt.builder import Builder
from simulated_tensorrt.network import Parser
from simulated_tensorrt.runtime import Runtime


def create_builder(logger: int, _: int) -> int:
    return Builder(_announced(logger)).address


def create_runtime(logger: int, _: int) -> int:
    return Runtime(_announced(logger)).address


def create_parser(network: int, logger: int) -> int:
    return Parser(Logger(logger), simulated(network)).address


def _announced(address: int) -> Logger:
    logger = Logger(address)
    version = ".".join(map(str, VERSION))
    logger.log(Logger.INFO, f"This stands for TensorRT {version}, on the CPU: no figure from it is a GPU's")
    return logger
