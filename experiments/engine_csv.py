"""One line of engine.csv: what the engine did with one workload. Knows nothing of devices."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from experiments.harness import append_row, read_rows

# before there were configurations: one device, medians alone
FIRST_HEADER = (
    "model,workload,eager,requests,prompt_tokens,output_tokens,seconds,output_tok_s,"
    "ttft_ms_median,tpot_ms_median,preemptions,date,gpu,torch,triton,driver,commit"
)
FORMER_NAMES = {"ttft_ms_p50": "ttft_ms_median", "tpot_ms_p50": "tpot_ms_median"}
FORMERLY = {"config": "one", "gpus": "1"}  # what no column had to say


@dataclass(frozen=True, kw_only=True)
class EngineReading:
    """One reading; the fields are the columns. None, an empty cell: not measured."""

    model: str
    workload: str
    config: str  # one | replicas | pd
    gpus: int
    load: float | None = None  # of Poisson arrivals: their rate as a share of the capacity
    rate: float | None = None  # arrivals per second
    eager: bool
    requests: int
    prompt_tokens: int
    output_tokens: int
    seconds: float  # from the common start to the end of the last request
    output_tok_s: float
    ttft_ms_mean: float | None = None
    ttft_ms_p50: float | None = None
    ttft_ms_p99: float | None = None
    tpot_ms_mean: float | None = None
    tpot_ms_p50: float | None = None
    tpot_ms_p99: float | None = None
    itl_ms_mean: float | None = None  # over all gaps between tokens; of arrivals alone
    itl_ms_p50: float | None = None
    itl_ms_p99: float | None = None
    goodput_req_s: float | None = None  # requests within both limits of experiments.serving
    preemptions: int
    date: str
    gpu: str
    torch: str
    triton: str
    driver: str
    commit: str

    @property
    def run(self) -> tuple[str, str, str, str]:
        """What the readings of one model in one run have in common."""
        return self.model, self.gpu, self.date, self.commit


COLUMNS = [f.name for f in fields(EngineReading)]
_TYPES = get_type_hints(EngineReading)


def read_engine_csv(path: Path) -> list[EngineReading]:
    """Every line of an engine.csv. ValueError, with the line, where it is not one, or where there
    is none."""
    readings = []
    for line, row in enumerate(read_rows(path, COLUMNS), start=2):
        try:
            readings.append(EngineReading(**{c: _parse(row[c], _TYPES[c]) for c in COLUMNS}))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {line} must be a whole reading, got {row}") from error
    if not readings:
        raise ValueError(f"{path} must hold readings, got a header alone")
    return readings


def migrate(path: Path) -> None:
    """Rewrite an engine.csv of the first columns with those of today; others stay as they are.

    What was not measured then stays empty; every value is kept to the letter.
    """
    if not path.exists() or path.read_text().partition("\n")[0] != FIRST_HEADER:
        return
    new = path.with_suffix(".csv.new")
    for row in read_rows(path, FIRST_HEADER.split(",")):
        append_row(new, {c: row.get(FORMER_NAMES.get(c, c), FORMERLY.get(c, "")) for c in COLUMNS})
    new.replace(path)  # at once: an interrupted run loses nothing


def _parse(text: Any, kind: Any) -> Any:
    optional = type(None) in get_args(kind)
    if optional:
        if text == "":
            return None
        kind = get_args(kind)[0]
    if kind is bool:
        return {"True": True, "False": False}[text]
    return kind(text)
