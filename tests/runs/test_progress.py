"""Progress is one line that fits the terminal; a run of an earlier version goes on."""

import io
import json
import re
from pathlib import Path

from rich.console import Console

from imstep.runs.config import RunConfig
from imstep.runs.progress import LastStep, TrainingProgress
from imstep.runs.rundir import RunDirectory
from imstep.runs.train import train

CONFIG = RunConfig("digits-mlp", "newton-krylov", budget=60.0, examples=20)


def lines_of(width: int) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=True, width=width, color_system=None)
    trainer = CONFIG.build()
    with TrainingProgress(console, CONFIG.optimizer, CONFIG.limits) as progress:
        for row in trainer.run(CONFIG.limits):
            progress(trainer, row)
            progress._live.refresh()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).replace("\r", "\n")
    return [line.rstrip() for line in text.splitlines() if "%" in line]


def test_progress_is_one_line_with_the_time_left() -> None:
    wide, narrow = lines_of(80), lines_of(56)
    assert max(map(len, wide)) <= 80
    assert max(map(len, narrow)) <= 56
    assert re.fullmatch(r"━+ +\d+ %  \d+/60 gradient-eq\.  loss \S+  \d+:\d\d left  held-out \S+( .*)?", wide[-1])
    assert "loss" in narrow[-1]
    assert "held-out" not in narrow[-1]


def test_a_run_that_made_no_step_says_so() -> None:
    assert LastStep().describe() == "No step was made"


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    """Its settings lack what came later, and it called the usual end of a solve stalled."""
    with RunDirectory.create(tmp_path / "run", CONFIG) as run:
        train(CONFIG.build(), run)
        expected = run.rows()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    del config["config"]["table"], config["config"]["files"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    log = tmp_path / "run" / "steps.jsonl"
    assert '"enough"' in log.read_text()
    log.write_text(log.read_text().replace('"enough"', '"stalled"'))
    with RunDirectory.open(tmp_path / "run") as run:
        trainer = run.config.build()
        run.restore(trainer)
        assert run.rows() == expected
        state = trainer.state_dict()
        state["totals"]["statuses"] = {"stalled": 3}
        trainer.load_state_dict(state)
        assert trainer.totals.statuses == {"enough": 3}
