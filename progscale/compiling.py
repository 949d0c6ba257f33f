"""`torch.compile` of a model's blocks, anew in each stage: no stage runs a graph that was made for another."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch

from progscale.blocks import block_modules
from progscale.engine.base import Engine
from progscale.errors import UserError
from progscale.models.family import Family

# Graphs of a block: trained or frozen, in training and in evaluation, and once more where a micro-batch has a single row.
_GRAPHS = 8


class Compiler:
    """Compiles each block by itself and in place: names, hooks and wrappers of the model stay as they are.

    Blocks of a kind share their graphs, so that compiling takes as long for 24 blocks as for one; not so in decoders, where each
    looks at its own number. Lengths and rows are symbols in the graphs; torch's guards make another one where a parameter is
    trained or frozen that was not. Text is generated without them: each length would need its own.

    Args:
        engine: that runs the model, and partitions no parameters: a compiled block does not come by ZeRO-3's hooks.
        family: of the model.
        backend: of torch.compile.
    """

    def __init__(self, engine: Engine, family: Family, backend: str) -> None:
        assert not engine.partitions_parameters
        self._stacks = [list(blocks.values()) for blocks in block_modules(engine.module, family).values()]
        self._backend = backend
        # DDP would cut the graphs at the borders of its buckets, and fails at it where sizes are symbols; gradients of one block
        # are sent while the next is at work all the same.
        torch._dynamo.config.optimize_ddp = False
        # Above its limit torch would go on without compiling; some models have a graph for each block, which knows its number.
        limit = _GRAPHS * sum(map(len, self._stacks))
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
        torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, limit)

    def begin_stage(self, depth: int) -> None:
        """Drops the graphs of the stage before, whose weights may lie elsewhere now.

        Args:
            depth: blocks from the bottom of the first stack that are not compiled, as a cache steps in there.
        """
        self.close()
        for number, blocks in enumerate(self._stacks):
            for block in blocks[depth if number == 0 else 0 :]:
                block.compile(backend=self._backend, dynamic=True)

    def close(self) -> None:
        """Every block is as it was."""
        torch.compiler.reset()
        for blocks in self._stacks:
            for block in blocks:
                block._compiled_call_impl = None


def check_backend(backend: str, device: torch.device) -> None:
    """Looks for what a backend needs before a run begins.

    Raises:
        UserError: no C++ compiler or Python headers for a CPU, no Triton or C compiler for a GPU.
    """
    if backend != "inductor":
        return
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
            raise UserError(
                "train.compile: 'inductor' on a CPU needs Python's headers and finds none; install them (Debian: apt-get install "
                "python3-dev), or set it to off"
            )
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise UserError(
                "train.compile: 'inductor' needs a C++ compiler on a CPU and finds none; install one (Debian: apt-get install "
                "g++), or set it to off"
            ) from error
        return
    from torch.utils._triton import has_triton

    if not has_triton() or not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        raise UserError(
            f"train.compile: 'inductor' needs Triton and a C compiler on {device.type} and does not find both; pip install "
            "triton, apt-get install gcc, or set it to off"
        )
