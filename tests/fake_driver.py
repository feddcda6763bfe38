"""A stand-in for cuda.bindings.driver: counts what lives, and says no where it is told to.

SMs are numbered, so that a test sees which ones a stage has. Destroying in the wrong order, or
twice, is an error as in the driver.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

from green.partition import GRAINS, Grain


class Code(IntEnum):
    """Those of CUresult that the tests need."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_NOT_SUPPORTED = 801
    CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION = 915


def resource(sms: list[int]) -> SimpleNamespace:
    return SimpleNamespace(sms=sms, sm=SimpleNamespace(smCount=len(sms)))


@dataclass
class FakeDriver:
    """One device of num_sms. fails_at: (call, how often it is let through, code)."""

    num_sms: int = 132
    grain: Grain = GRAINS[9]  # to which it rounds up what a group is asked to have
    version: int = 13000
    fails_at: tuple[str, int, Code] | None = None
    groups_made: int | None = None  # at most, of the smallest; None: all but one
    calls: list[str] = field(default_factory=list)
    codes: list[Code] = field(default_factory=list)  # but for the one that is asked for
    contexts: dict[int, list[int]] = field(default_factory=dict)  # handle -> SMs
    streams: dict[int, int] = field(default_factory=dict)  # handle -> context
    handles: int = 0

    CUdevResourceType = SimpleNamespace(CU_DEV_RESOURCE_TYPE_SM=1)
    CUgreenCtxCreate_flags = SimpleNamespace(CU_GREEN_CTX_DEFAULT_STREAM=1)
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=1)

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        return self._counted(name, found) if name.startswith("cu") else found

    def _counted(self, name: str, run: Callable[..., tuple]) -> Callable[..., tuple]:
        def call(*args: Any) -> tuple:
            call_no = (name, self.calls.count(name))
            self.calls.append(name)
            if self.fails_at is not None and self.fails_at[:2] == call_no:
                return (self.fails_at[2], None)
            given = run(*args)
            self.codes.append(given[0])
            return given

        return call

    def cuDriverGetVersion(self) -> tuple:
        return Code.CUDA_SUCCESS, self.version

    def cuDeviceGet(self, index: int) -> tuple:
        return Code.CUDA_SUCCESS, index

    def cuDeviceGetDevResource(self, device: int, kind: int) -> tuple:
        return Code.CUDA_SUCCESS, resource(list(range(self.num_sms)))

    def cuDevSmResourceSplitByCount(self, count: int, whole: Any, flags: int, least: int) -> tuple:
        if least > whole.sm.smCount or flags:
            return Code.CUDA_ERROR_INVALID_RESOURCE_CONFIGURATION, None, 0, None
        step = self.grain.step
        size = min(max(-(-least // step) * step, self.grain.least), whole.sm.smCount)
        most = self.groups_made or whole.sm.smCount // self.grain.least - 1
        made = min(count, whole.sm.smCount // size, most or 1)
        groups = [resource(whole.sms[i * size : (i + 1) * size]) for i in range(made)]
        groups += [resource([])] * (count - made)  # the driver's array is as long as was asked
        return Code.CUDA_SUCCESS, groups, made, resource(whole.sms[made * size :])

    def cuDevResourceGenerateDesc(self, parts: list[Any], count: int) -> tuple:
        assert len(parts) == count
        return Code.CUDA_SUCCESS, [sm for part in parts for sm in part.sms]

    def cuGreenCtxCreate(self, description: list[int], device: int, flags: int) -> tuple:
        assert flags == 1 and description
        self.contexts[self._handle()] = description
        return Code.CUDA_SUCCESS, self.handles

    def cuGreenCtxGetDevResource(self, context: int, kind: int) -> tuple:
        return Code.CUDA_SUCCESS, resource(self.contexts[context])

    def cuGreenCtxStreamCreate(self, context: int, flags: int, priority: int) -> tuple:
        assert flags == 1 and context in self.contexts
        self.streams[self._handle()] = context
        return Code.CUDA_SUCCESS, self.handles

    def cuStreamDestroy(self, stream: int) -> tuple:
        known = self.streams.pop(stream, None) in self.contexts
        return (Code.CUDA_SUCCESS if known else Code.CUDA_ERROR_INVALID_CONTEXT,)

    def cuGreenCtxDestroy(self, context: int) -> tuple:
        is_free = context not in self.streams.values()
        known = self.contexts.pop(context, None) is not None
        return (Code.CUDA_SUCCESS if known and is_free else Code.CUDA_ERROR_INVALID_CONTEXT,)

    def _handle(self) -> int:
        self.handles += 1
        return self.handles
