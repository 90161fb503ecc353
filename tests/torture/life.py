"""A life: one training from nothing to its end through hit after hit, and what must hold after each of them."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import RecipeError
from common.train import checkpoint
from common.train.manifest import Manifest
from tests.doubles.machines import MACHINES, fake_machine
from tests.support.runs import folders, outcome
from tests.torture import victim
from tests.torture.disk import Disk
from tests.torture.victim import Victim
from tests.torture.watch import PHASES, Control
from tools.export.record import damaged, read_record

KINDS = {"kill -9": 3, "power cut": 4, "SIGTERM": 2, "SIGINT": 2, "pause": 1}  # with their weights
KILLS = ("kill -9", "power cut")
NUMBERS = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT, "pause": signal.SIGSTOP}  # the others: SIGKILL
WEIGHTS = {"checkpoint": 5, "step": 3, "evaluation": 3, "start": 2, "finish": 2, "export": 2}  # of phases; else 1
AFTER = PHASES.index("after the end")
BOARD = "n150"  # that the double stands for
HITS = 12  # of a life; then nothing hinders it any more
BY_CALL = 0.6  # of the hits come before a chosen call that changes a file; the others at a moment of a phase
BUT_WRITES = 0.6  # of those: before one that makes, syncs, renames or deletes something
COMMAND, FIRST, SECOND = 0, 1, 2  # of Control.pids


@dataclass(frozen=True)
class Subject:
    """A recipe on an engine: the words after `recipe`, and what they start."""

    name: str  # engine/recipe
    words: list[str]
    ranks: int
    double: bool  # of ttml, on a machine whose board is a few files


@dataclass(frozen=True)
class Profile:
    """What an unbroken run came to, and how its life is spread over the phases."""

    outcome: Any
    export: Any
    visits: list[int]
    calls: list[int]
    no_writes: list[int]  # of the calls: those that make, sync, rename or delete
    seconds: list[float]


@dataclass
class Hit:
    """One blow: its kind, the phase, and there either the call that it comes before or a visit and a moment of it."""

    kind: str
    phase: int
    call: int  # 0: by time
    visit: int
    seconds: float
    whom: int
    but_writes: bool  # the call is counted among those that write no data: a checkpoint is a hundred writes
    came: str = ""  # what it hit; empty until then
    where: int = 0  # the phase that it found; by time, the run may be further than it was to be

    def __str__(self) -> str:
        place = (
            f"before call {self.call}{' but writes' * self.but_writes} of"
            if self.call
            else f"{self.seconds:.4f} s into visit {self.visit} of"
        )
        who = f" of process {self.whom}" if self.whom else ""
        place = "" if self.phase == AFTER else f"{place} "
        return f"{self.kind}{who}, {place}{PHASES[self.phase]}: {self.came or 'the run ended before'}"


@dataclass
class Life:
    """What came of a life: its hits, and the first thing that was wrong, with the screen's last lines."""

    subject: str
    number: int
    hits: list[Hit] = field(default_factory=list)
    fault: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as it is handed on: the hits that came as (kind, phase), and all of them in words."""
        came = [(hit.kind, PHASES[hit.where]) for hit in self.hits if hit.came]
        facts = {"subject": self.subject, "number": self.number, "fault": self.fault}
        return {**facts, "came": came, "words": list(map(str, self.hits))}


class Fault(Exception):
    """Something that must hold did not."""


def draw(rng: random.Random, subject: Subject, profile: Profile, trained: bool, calls: bool) -> Hit:
    """Return the next hit; `calls`: a call can be chosen, and power be cut. Once it is `trained`, steps are over."""
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    if kind == "power cut" and not calls:
        kind = "kill -9"
    past = {PHASES.index(name) for name in ("data", "step", "evaluation", "checkpoint", "finish")} if trained else ()
    phases = [number for number, visits in enumerate(profile.visits) if visits and number not in past]
    phase = rng.choices(phases, [WEIGHTS.get(PHASES[number], 1) for number in phases])[0]
    but_writes = rng.random() < BUT_WRITES
    visits, of_phase = profile.visits[phase], (profile.no_writes if but_writes else profile.calls)[phase]
    by_call = calls and of_phase > 0 and rng.random() < BY_CALL
    whom = COMMAND
    if subject.ranks > 1 and kind not in ("SIGTERM", "SIGINT"):
        whom = FIRST if kind == "power cut" else rng.choice((COMMAND, FIRST, SECOND))
    return Hit(
        kind,
        phase,
        rng.randint(1, max(1, min(of_phase, round(2 * of_phase / visits)))) if by_call else 0,
        rng.randint(1, min(2, visits)),
        rng.uniform(0, profile.seconds[phase] / visits),
        whom,
        but_writes,
    )


class Body:
    """The folder that a life goes on in, and its disk."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        self.subject, self.root, self.log = subject, folder / "root", folder / "calls.log"
        shutil.rmtree(folder, ignore_errors=True)
        self.root.mkdir(parents=True)
        self.log.touch()
        self.out = self.root / "runs"
        self.machine = fake_machine(folder / "machine", MACHINES[BOARD] if subject.double else ())
        self.disk = Disk(self.root, self.log)
        self.promised = 0  # the newest step that a run of this life said to be saved

    def start(self, hit: Hit | None) -> Victim:
        """Start the command, with `hit` to come if it is one before a call."""

        def arm(control: Control) -> None:
            if hit and hit.call:
                control.target, control.at, control.whom = hit.phase, hit.call, hit.whom
                control.but_writes = int(hit.but_writes)
                control.signal = NUMBERS.get(hit.kind, signal.SIGKILL)

        environment = {"RECIPES_HOME": str(self.root / "home"), "RECIPES_SYSFS_ROOT": str(self.machine)}
        within = doubles_here if self.subject.double else contextlib.nullcontext
        words = [*self.subject.words, "--out", str(self.out)]
        return victim.start(words, environment, self.root, self.log, arm, within)

    def strike(self, found: Victim, hit: Hit) -> None:
        """Have the hit come, or the run end before it."""
        control, number = found.control, NUMBERS.get(hit.kind, signal.SIGKILL)
        while True:
            ended = found.ended()  # looked at first: it may be struck, and end of that, between the two looks
            if control.struck if hit.call else control.visits[hit.phase] >= hit.visit:
                break
            if ended:
                return
            time.sleep(0.0003)
        if hit.call:
            hit.came = control.what.decode(errors="replace").replace(f"{self.root}/", "")
            hit.where = hit.phase
        else:
            time.sleep(hit.seconds)
            if found.ended():
                return
            hit.came = f"step {control.saved} saved"
            if number == signal.SIGKILL:
                found.stop()
            hit.where = control.phase
            whom = hit.whom if control.pids[hit.whom] else COMMAND
            found.send(number, whom)
            if number == signal.SIGKILL and hit.kind != "power cut":
                found.send(signal.SIGCONT)
        if hit.kind == "power cut":
            found.send(signal.SIGKILL)
        if hit.kind == "pause":
            time.sleep(hit.seconds)
            found.send(signal.SIGCONT)

    def end(self, found: Victim) -> int:
        """Wait for the command's end; return its code. Raises Fault where it hangs or shows a traceback."""
        code = found.end()
        self.promised = max(self.promised, found.control.saved)
        self.disk.read()
        if code is None:
            raise Fault(f"it did not end within {victim.SECONDS} s")
        screen = found.screen.read_text(encoding="utf-8", errors="replace")
        if "Traceback" in screen or "bug:" in screen:
            raise Fault("a traceback")
        return code

    def runs(self) -> list[Path]:
        return folders(self.out)

    def done(self) -> list[Path]:
        """Return the runs whose manifest says that they are done."""
        return [run for run in self.runs() if Manifest.load(run).exit_reason == "done"]

    def trained(self) -> bool:
        return any(Manifest.load(run).trained for run in self.runs())

    def check(self) -> None:
        """Refuse a folder in which something that has its name is not whole, or something promised is gone."""
        newest = 0
        for run in self.runs():
            with wrong(f"{run.name}/manifest.json"):
                Manifest.load(run)
            for step in checkpoint.steps_saved(run / "checkpoints"):
                with wrong(f"step {step} has its name"):
                    checkpoint.verify(checkpoint.folder_of(run / "checkpoints", step))
                newest = max(newest, step)
            export = run / "export"
            if export.exists():
                with wrong("export/ has its name"):
                    record = read_record(export)
                    damage = damaged(export, record) if record else "there is no export.json"
                    if damage:
                        raise Fault(f"export/ has its name, and {damage}")
        if newest < self.promised:
            raise Fault(f"step {self.promised} was said to be saved, the newest that is there is {newest}")

    def compare(self, profile: Profile) -> None:
        """Refuse a run that is done and not the unbroken one, number for number and tensor for tensor."""
        done = self.done()
        if len(done) != 1:
            raise Fault(f"{len(done)} runs are done")
        for what, found, expected in (
            ("the run", outcome(done[0]), profile.outcome),
            ("the export", exported(done[0]), profile.export),
        ):
            if json.loads(json.dumps(found)) != expected:
                raise Fault(f"{what} is not the unbroken one: {differing(json.loads(json.dumps(found)), expected)}")


@contextlib.contextmanager
def wrong(what: str) -> Iterator[None]:
    try:
        yield
    except (RecipeError, OSError) as error:
        raise Fault(f"{what}: {error}") from error


def differing(found: Any, expected: Any) -> str:
    """Return the first place where two JSON values differ, with both."""
    if isinstance(found, dict) and isinstance(expected, dict) and found.keys() == expected.keys():
        return next(f"{key}: {differing(found[key], expected[key])}" for key in found if found[key] != expected[key])
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return next(f"{index}: {differing(*both)}" for index, both in pairs if both[0] != both[1])
    return f"{str(found)[:200]} for {str(expected)[:200]}"


def exported(run: Path) -> Any:
    """Return the sha256 of each tensor file of a run's export."""
    record = read_record(run / "export")
    return {name: digest for name, digest in record["sha256"].items() if "safetensors" in name} if record else None


@contextlib.contextmanager
def doubles_here() -> Iterator[None]:
    """Have the double stand for ttml in this process."""
    from tests.doubles import doubles

    with doubles("B", 1):
        yield


def unbroken(subject: Subject, folder: Path) -> Profile:
    """Train it without a hit. Raises Fault where that fails, or where the library misses a call."""
    body = Body(subject, folder)
    found = body.start(None)
    code = body.end(found)
    if code != 0:
        raise Fault(f"the unbroken run ended with {code}")
    if found.control.calls and (unseen := body.disk.unseen()):
        raise Fault(f"written past the library that watches: {', '.join(unseen[:5])}")
    body.check()
    (run,) = body.done()
    control = found.control
    counts = (list(control.visits), list(control.calls_in), list(control.no_writes_in))
    return Profile(json.loads(json.dumps(outcome(run))), exported(run), *counts, list(control.seconds_in))


def live(subject: Subject, number: int, seed: str, profile: Profile, folder: Path) -> Life:
    """Live a life: the `number`-th of this subject under `seed`, which fix each hit and what each cut leaves."""
    rng = random.Random(f"{seed}/{subject.name}/{number}")
    life, calls = Life(subject.name, number), sum(profile.calls) > 0
    body = Body(subject, folder)
    try:
        over = False
        while not over:
            hit = draw(rng, subject, profile, body.trained(), calls) if len(life.hits) < HITS else None
            once(body, hit, life, rng)
            over = hit is None or bool(body.done())
        if calls and rng.random() < 0.5:
            hit = Hit("power cut", AFTER, 0, 0, 0.0, COMMAND, False, "done", AFTER)
            life.hits.append(hit)
            hit.came += f"; {body.disk.cut(rng)}"
            body.check()
        body.compare(profile)
    except Fault as fault:
        screen = body.log.with_suffix(".screen").read_text(encoding="utf-8", errors="replace")
        life.fault = f"{fault}\n{screen[-4000:]}"
    return life


def once(body: Body, hit: Hit | None, life: Life, rng: random.Random) -> None:
    """Run the command once and hit it; check what is left."""
    body.log.with_suffix(".screen").write_text("")
    found = body.start(hit)
    if hit:
        life.hits.append(hit)
        body.strike(found, hit)
    code = body.end(found)
    if hit and code == 0 and hit.kind in KILLS and not hit.call:
        hit.came = ""  # the command was past its end, and gave back its memory
    allowed = codes(hit, body.subject)
    if code not in allowed:
        raise Fault(f"the command ended with {code}, not with one of {sorted(allowed)}")
    if found.control.calls and (unseen := body.disk.unseen()):
        raise Fault(f"written past the library that watches: {', '.join(unseen[:5])}")
    if hit and hit.came and hit.kind == "power cut":
        hit.came += f"; {body.disk.cut(rng)}"
    body.check()


def codes(hit: Hit | None, subject: Subject) -> set[int]:
    """Return the codes that the command may end with: 75 and 130 are what an asked one ends with, 5 lost a rank."""
    if hit is None or hit.kind == "pause" or not hit.came:
        return {0}
    if hit.kind in ("SIGTERM", "SIGINT"):
        return {0, 75, 130, -int(NUMBERS[hit.kind])}
    if subject.ranks == 1:
        return {-9}
    return {-9, 5} if hit.kind == "power cut" else {-9, 5, 0}
