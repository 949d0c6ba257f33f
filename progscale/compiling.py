"""`torch.compile` of a model's blocks, anew in each stage: no stage runs a graph that was made for another."""

from __future__ import annotations

import torch

from progscale.blocks import block_modules
from progscale.engine.base import Engine
from progscale.errors import UserError
from progscale.models.family import Family

# Graphs of a block: trained or frozen, in training and in evaluation, and once more where a micro-batch has a single row.
_GRAPHS = 8


class Compiler:
    """Compiles each block by itself and in place: names, hooks and wrappers of the model stay as they are.

    Blocks of a kind share their graphs, so that compiling takes as long for 24 blocks as for one. Lengths and rows are symbols in
    them; torch's guards make another graph where a parameter is trained or frozen that was not.

    Args:
        engine: that runs the model, and partitions no parameters: a compiled block does not come by ZeRO-3's hooks.
        family: of the model.
        backend: of torch.compile.
    """

    def __init__(self, engine: Engine, family: Family, backend: str) -> None:
        assert not engine.partitions_parameters
        self._stacks = [list(blocks.values()) for blocks in block_modules(engine.module, family).values()]
        self._backend = backend
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
        UserError: no C++ compiler for a CPU, no Triton for a GPU.
    """
    if backend != "inductor":
        return
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise UserError(
                "train.compile: 'inductor' needs a C++ compiler on a CPU and finds none; install one (Debian: apt-get install "
                "g++), or set it to off"
            ) from error
        return
    from torch.utils._triton import has_triton

    if not has_triton():
        raise UserError(
            f"train.compile: 'inductor' needs Triton on {device.type} and finds none that works; pip install triton, or set it "
            "to off"
        )
