"""The CUDA driver's calls for green contexts, with its errors as exceptions."""

from typing import Any

OLDEST = 12050  # CUDA 12.5: the driver that can make a stream on a green context
NOT_SUPPORTED = 801
ADVICE = {
    2: "free memory of the GPU or close other partitions: a green context takes about 8 MiB",
    3: "use the device through torch first",
    4: "close partitions before the process ends",
    201: "use the device through torch first",
    709: "close a partition once, and use nothing of it afterwards",
    914: "take a device whose SMs can be split, not a MIG instance",
    915: "ask for other numbers of SMs: `green.partition.legal_splits` lists them",
    917: "drop the graphs and events of a partition before it is closed",
}
OTHERWISE = "look the code up among CUresult, or run without green contexts"


class GreenContextError(RuntimeError):
    """A driver call that failed: which, with what, and what can be done about it."""

    def __init__(self, call: str, code: int, name: str, advice: str) -> None:
        super().__init__(f"{call} failed with {name} ({code}): {advice}")
        self.call, self.code, self.name, self.advice = call, code, name, advice


class GreenContextUnsupported(GreenContextError):
    """There are no green contexts here, whatever is asked for. `reason` says why."""

    def __init__(self, reason: str, *, call: str = "") -> None:
        RuntimeError.__init__(self, f"no green contexts: {reason}")
        self.call, self.code, self.name = call, NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED"
        self.reason, self.advice = reason, "run without green contexts"


class Driver:
    """`api` is cuda.bindings.driver, or what stands in for it."""

    def __init__(self, api: Any) -> None:
        self.api = api

    def call(self, name: str, *args: Any) -> Any:
        """What the call gives back behind its code: None, a value, or several as a list.

        Raises GreenContextError where the driver says no, and GreenContextUnsupported where it does
        not know the call or says that it is not supported.
        """
        try:
            code, *values = getattr(self.api, name)(*args)
        except (AttributeError, RuntimeError) as error:  # a driver or a package older than the call
            raise GreenContextUnsupported(f"{name}: {error}", call=name) from error
        if int(code) == NOT_SUPPORTED:
            raise GreenContextUnsupported(f"the driver says so of {name}", call=name)
        if int(code):
            code_name = getattr(code, "name", "an unknown code")
            raise GreenContextError(name, int(code), code_name, ADVICE.get(int(code), OTHERWISE))
        return values if len(values) > 1 else next(iter(values), None)

    def enum(self, kind: str, name: str) -> Any:
        """One of the driver's constants. GreenContextUnsupported where the package is older."""
        try:
            return getattr(getattr(self.api, kind), name)
        except AttributeError as error:
            raise GreenContextUnsupported(f"{kind}.{name}: {error}") from error


def load_driver() -> Driver:
    """The machine's. GreenContextUnsupported, with the reason, where there is none or it is old."""
    driver = Driver(_import_api())
    version = driver.call("cuDriverGetVersion")
    if version < OLDEST:
        got = f"{version // 1000}.{version % 1000 // 10}"
        raise GreenContextUnsupported(f"the driver must be of CUDA 12.5 or later, got {got}")
    return driver


def _import_api() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise GreenContextUnsupported(f"cuda-python must be installed, got: {error}") from error
    return driver
