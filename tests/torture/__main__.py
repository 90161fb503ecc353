"""`make torture`: lives through kills and power cuts; code 6 where something did not hold.

Each recipe of recipes/, made tiny, is trained again and again from nothing to its export, and hit up to twelve times on
the way: by kill -9, SIGTERM, SIGINT, a pause, a power cut. From the environment:

KILLS    hits that the default engine, or the one that is named, gets (1000); each other one gets a fifth
SEED     what the hits, and what each power cut leaves, are drawn by (7)
HOURS    in place of KILLS: all engines take turns for so long
ENGINE   only one of cpu, cpu-x2 (two processes), double (the backend of boards)
NAME     only this recipe
AT       engine/recipe/number, as a failure prints it: that life alone
FAULT    a defect to plant (planted.py), which must be found

The number of a call that a hit comes before is kept, so a life is lived again alike; a hit by time may come elsewhere.
"""

from __future__ import annotations

import collections
import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import config as configs
from common import hardware
from common.errors import UsageError, VerificationError
from common.paths import ROOT
from tests.doubles.machines import bare_environment
from tests.doubles.tiny_recipe import tiny_scratch
from tests.torture import watch
from tests.torture.life import BOARD, KINDS, Subject
from tests.torture.planted import FAULTS
from tests.torture.watch import PHASES
from tools.recipes import RECIPES
from tools.verify.tiny_base import write_tiny_base

ENGINES = {"cpu": "cpu", "cpu-x2": "cpu-x2", "double": BOARD}  # and the hardware that is named to `recipe run`
LANES = 2
ROOM = 1 << 28  # bytes: ten times what lanes were seen to take
SAID_EVERY = 30  # seconds
SMALL = (
    "eval_config.every=2",
    "eval_config.max_new_tokens=1",
    "checkpoint_config.every=3",
    "checkpoint_config.keep_last=2",
    "device_config.threads=1",
    "device_config.compile=never",
    "training_config.batch_size=8",
    "training_config.scheduler.warmup_steps=1",
    "data_config.max_length=64",
    "logging_config.log_every=1",
)


def subjects(folder: Path, engines: list[str], names: list[str]) -> Iterator[Subject]:
    """Yield every recipe, or those of these names, on each engine; what they are made tiny with lies in `folder`."""
    base = write_tiny_base(folder / "tiny", context=16384)
    scratch = tiny_scratch(folder / "play.txt")
    for engine in engines:
        for recipe in sorted(path.parent for path in RECIPES.glob("*/config.yaml")):
            if names and recipe.name not in names:
                continue
            config = configs.load(recipe, hardware.get("cpu"))
            if (config.data.source or "").startswith("hub:"):
                print(f"left out: {recipe.name}, whose rows come from the Hub", flush=True)
                continue
            fitting = scratch if config.model.init == "random" else (f"model_config.base={base}",)
            sets = [*SMALL, *fitting]
            if engine == "cpu":
                sets.append("device_config.mesh_shape=[1,1]")
            words = ["run", str(recipe), "--hw", ENGINES[engine], "--steps", "8", "--no-container"]
            words += [word for value in sets for word in ("--set", value)]
            yield Subject(f"{engine}/{recipe.name}", words, 2 if engine == "cpu-x2" else 1, engine == "double")


class Lane:
    """A process that lives lives, in a folder of its own."""

    def __init__(self, folder: Path, number: int, library: Path | None) -> None:
        place = folder / f"lane-{number}"
        (place / "tmp").mkdir(parents=True)  # what was killed leaves things there
        one = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        environment = {**bare_environment(), **one, "TMPDIR": str(place / "tmp")}
        environment |= {"LD_PRELOAD": str(library)} if library else {}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.torture.lane", str(place)],
            cwd=ROOT,
            env=environment,
            stdin=pipe,
            stdout=pipe,
            text=True,
        )

    def ask(self, **task: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Return the answer to what was asked. Raises SystemExit where the lane died."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a lane of `make torture` ended with {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@dataclass(frozen=True)
class Asked:
    """What the environment asks for."""

    kills: int
    seed: str
    hours: float
    engines: list[str]
    names: list[str]
    at: str
    fault: str

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Asked:
        """Read it. Raises UsageError where a word is not known."""
        at, fault = environment.get("AT", ""), environment.get("FAULT", "")
        engine, _, rest = at.partition("/")
        engines = [one for one in (engine or environment.get("ENGINE"),) if one]
        names = [one for one in (rest.rpartition("/")[0] or environment.get("NAME"),) if one]
        for words, known, where in (
            (engines, list(ENGINES), "ENGINE or AT"),
            (names, [path.parent.name for path in RECIPES.glob("*/config.yaml")], "NAME or AT"),
            ([fault] if fault else [], list(FAULTS), "FAULT"),
        ):
            if unknown := [word for word in words if word not in known]:
                raise UsageError(f"{unknown[0]!r} is not known", where=where, todo=f"one of {', '.join(known)}")
        try:
            kills, hours = int(environment.get("KILLS") or 1000), float(environment.get("HOURS") or 0)
            int(at.rpartition("/")[2] or 0)
        except ValueError as error:
            raise UsageError(str(error), where="KILLS, HOURS or AT", todo="give numbers") from error
        return cls(kills, environment.get("SEED") or "7", hours, engines or list(ENGINES), names, at, fault)


class Torture:
    """The lives that are asked for, and what came of them."""

    def __init__(self, folder: Path, library: Path | None, asked: Asked) -> None:
        self.folder, self.asked = folder, asked
        if library is None:
            print("left out: power cuts and hits before a chosen call, which need a C compiler (cc)", flush=True)
        self.subjects = list(subjects(folder, asked.engines, asked.names))
        plan = {"seed": asked.seed, "fault": asked.fault, "watched": library is not None}
        plan["subjects"] = [vars(subject) for subject in self.subjects]
        (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        self.lanes = [Lane(folder, number, library) for number in range(LANES)]
        self.hits: collections.Counter[tuple[str, str, str]] = collections.Counter()  # (engine, kind, phase)
        self.lives = collections.Counter[str]()  # by engine
        self.faults: list[str] = []
        self.said = time.monotonic()  # when it was said how far this is

    def profile(self, names: list[str]) -> None:
        """Train these subjects unbroken."""
        for name in names:
            self.lanes[0].ask(subject=name)
            if fault := self.lanes[0].answer()["fault"]:
                raise SystemExit(f"{name}: {fault}")

    def live(self, asked: Iterator[tuple[str, int]]) -> None:
        """Have the lanes live the lives (subject, number) that `asked` yields, as long as nothing fails."""
        with selectors.DefaultSelector() as waiting:
            going = 0
            for lane in self.lanes:
                assert lane.process.stdout is not None
                waiting.register(lane.process.stdout, selectors.EVENT_READ, lane)
                going += self._next(lane, asked)
            while going:
                for key, _ in waiting.select():
                    self.take(key.data.answer())
                    going += self._next(key.data, asked) - 1

    def _next(self, lane: Lane, asked: Iterator[tuple[str, int]]) -> int:
        found = None if self.faults else next(asked, None)
        if found is None:
            return 0
        lane.ask(subject=found[0], life=found[1])
        return 1

    def take(self, life: dict[str, Any]) -> None:
        """Count a life's hits, and say it if something did not hold."""
        engine = life["subject"].partition("/")[0]
        self.lives[engine] += 1
        for kind, phase in life["came"]:
            self.hits[engine, kind, phase] += 1
        if time.monotonic() > self.said + SAID_EVERY:
            print(f"{engine}: {self.of(engine)} hits in {self.lives[engine]} trainings", flush=True)
            self.said = time.monotonic()
        if life["fault"]:
            self.faults.append(life["fault"])
            print(f"FAILED: make torture SEED={self.asked.seed} AT={life['subject']}/{life['number']}")
            for number, words in enumerate(life["words"], 1):
                print(f"  {number}. {words}")
            print(f"  {life['fault']}", flush=True)

    def of(self, engine: str) -> int:
        """Return the hits that came on an engine."""
        return sum(count for (where, _, _), count in self.hits.items() if where == engine)

    def until(self, engine: str, kills: int) -> Iterator[tuple[str, int]]:
        """Yield lives of the engine's subjects in turn, until so many hits came."""
        names = [subject.name for subject in self.subjects if subject.name.startswith(f"{engine}/")]
        number = 0
        while names and self.of(engine) < kills:
            yield names[number % len(names)], number // len(names)
            number += 1

    def during(self, seconds: float) -> Iterator[tuple[str, int]]:
        """Yield lives of all subjects in turn for so long."""
        deadline, number = time.monotonic() + seconds, 0
        while time.monotonic() < deadline:
            yield self.subjects[number % len(self.subjects)].name, number // len(self.subjects)
            number += 1

    def table(self) -> Iterator[str]:
        """Yield the lines of what was hit where, an engine after the other."""
        for engine in dict.fromkeys(where for where, _, _ in self.hits):
            yield f"{engine}: {self.of(engine)} hits in {self.lives[engine]} trainings"
            yield "  " + f"{'':12}" + "".join(f"{phase:>14}" for phase in PHASES)
            for kind in KINDS:
                yield f"  {kind:12}" + "".join(f"{self.hits[engine, kind, phase] or '':>14}" for phase in PHASES)

    def close(self) -> None:
        for lane in self.lanes:
            if lane.process.stdin:
                lane.process.stdin.close()
            lane.process.wait()


def main() -> int:
    """Torture as the environment asks; return the code to end with."""
    try:
        asked = Asked.of(os.environ)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    with (
        tempfile.TemporaryDirectory(prefix="torture-") as made,
        tempfile.TemporaryDirectory(prefix="torture-", dir=memory()) as place,
    ):
        return run(Torture(Path(place), watch.build(Path(made)), asked))


def memory() -> Path | None:
    """Return the folder whose files are in memory, where syncing costs nothing, or None: in a container it is small."""
    place = Path("/dev/shm")
    return place if os.access(place, os.W_OK) and shutil.disk_usage(place).free > ROOM else None


def run(torture: Torture) -> int:
    """Have the lives lived, print what came of them, and return the code to end with."""
    began, asked = time.monotonic(), torture.asked
    try:
        torture.profile([subject.name for subject in torture.subjects])
        print(f"{len(torture.subjects)} unbroken trainings: {time.monotonic() - began:.0f} s", flush=True)
        if asked.at:
            subject, _, number = asked.at.rpartition("/")
            torture.live(iter([(subject, int(number))]))
        elif asked.hours:
            torture.live(torture.during(asked.hours * 3600))
        else:
            for engine in asked.engines:
                torture.live(torture.until(engine, asked.kills if engine == asked.engines[0] else asked.kills // 5))
    finally:
        torture.close()
    print("\n".join(torture.table()))
    hits, lives = sum(torture.hits.values()), sum(torture.lives.values())
    print(
        f"{hits} hits in {lives} trainings, {time.monotonic() - began:.0f} s, SEED={asked.seed}: "
        f"{'FAILED' if torture.faults else 'all equal'}"
    )
    return VerificationError.code if torture.faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
