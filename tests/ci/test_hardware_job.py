"""The hardware job's phases on a faked machine: what is reset, what never is, and what goes out of service."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from ci.hardware import ALWAYS, STEPS, TRAIN_MINUTES, __main__, collect, commands, own, preflight, recover, summary
from ci.hardware import grade as grading
from ci.hardware import train as training
from ci.hardware.job import Job
from common.errors import MachineError, RecipeError, VerificationError
from tests.doubles import machines
from tests.doubles.tiny_recipe import FROM_SCRATCH
from tools.containers import launcher
from tools.containers.spec import process
from tools.doctor import machine as doctor_host
from tools.doctor.findings import Diagnosis
from tools.launch import stop
from tools.machine import detect, lease
from tools.machine.lease import Owner

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / ".github/workflows/hardware.yml"
CARD = machines.pci(0)
TT_SMI = """#!/bin/sh
echo "$*" >>"{log}"
{then}
"""


class Host:
    """A machine with an n150 whose tt-smi writes down what it is asked, and a job on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, machines.fake_host(folder / "root", "n150")
        self.tt_smi()

    def tt_smi(self, then: str = "exit 0") -> None:
        machines.write(self.folder / "bin/tt-smi", TT_SMI.format(log=self.folder / "asked", then=then))
        (self.folder / "bin/tt-smi").chmod(0o755)

    def hide_tt_smi(self, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Leave no tt-smi where it is looked for; return the file that tt-installer would make."""
        (self.folder / "bin/tt-smi").unlink()
        monkeypatch.setenv("HOME", str(self.folder / "home"))
        monkeypatch.delenv("TT_NEW_VENV_LOCATION", raising=False)
        assert shutil.which("tt-smi") is None
        return self.folder / "home/.tenstorrent-venv/bin/tt-smi"

    @property
    def resets(self) -> list[str]:
        log = self.folder / "asked"
        return [line for line in log.read_text().splitlines() if line != "-s"] if log.is_file() else []

    @property
    def quarantine(self) -> Path:
        return self.folder / "quarantine"

    def job(self, train: int | None = None, **more: object) -> Job:
        """A job whose training ended with the code `train`; None: it did not come to that."""
        job = Job.from_environment()
        job.out.mkdir(exist_ok=True)
        phases = {"preflight": {"code": 0, "said": ""}} | ({} if train is None else {"train": {"code": train}})
        job.note(phases=phases, **{"cards": [CARD], "nodes": 1, "process": "1@1", **more})
        if train is not None:
            machines.write(job.runs / "a-run/manifest.json", "{}")
        return job


@pytest.fixture
def host(tmp_path, monkeypatch) -> Host:
    found = Host(tmp_path)
    values = {
        "RECIPES_SYSFS_ROOT": str(found.root),
        "RECIPES_QUARANTINE": str(found.quarantine),
        "HW": "n150",
        "NAME": FROM_SCRATCH.name,
        "OUT": str(tmp_path / "out"),
        "CONTAINER": "0",
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    for name in ("STEPS", "TRAIN_MINUTES", "GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY", "RECIPES_CONTAINER"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("tools.recipes.RECIPES", FROM_SCRATCH.parent)

    def examine(job: Job, name: str) -> list[Diagnosis]:
        """As `recipe doctor` in a process of its own would find it, of the board alone."""
        choice = detect.choose(job.board.name, require_present=False)
        machine = doctor_host.Machine(job.board, choice.nodes, contained=False)
        return [finding for check in doctor_host.BOARD for finding in check(machine)]

    monkeypatch.setattr(recover, "examine", examine)
    return found


def no_engine() -> list[launcher.Container]:
    raise MachineError("no Docker engine answers here")


@pytest.fixture(autouse=True)
def without_engine(monkeypatch) -> None:
    """No test here looks at this machine's containers."""
    monkeypatch.setattr(launcher, "ours", no_engine)


# --- what is reset --------------------------------------------------------------------------------------------------


def test_a_board_that_nobody_trained_on_is_left_alone(host):
    job = host.job()
    job.note(phases={"preflight": {"code": 0}, "train": {"code": 4}})  # no image, say: there is no run
    assert "left as it is" in recover.recover(job)
    assert host.resets == []


@pytest.mark.parametrize("code", [5, 4, 1])
def test_a_run_that_did_not_close_its_board_is_followed_by_one_reset_by_pci_address(host, code):
    said = recover.recover(host.job(code))
    assert host.resets == [f"-r {CARD}"]
    assert "1 of at most 3" in said
    assert not host.quarantine.exists()
    assert lease.held(CARD) is None


def test_a_run_that_was_killed_with_its_phase_is_one_that_did_not_close_its_board(host):
    job = host.job(0)
    job.note(phases={"preflight": {"code": 0}, "train": {"begun": "then"}})
    recover.recover(job)
    assert host.resets == [f"-r {CARD}"]


@pytest.mark.parametrize("code", [6, 75, 130, 2, 3])
def test_a_run_that_closed_its_board_needs_no_reset(host, code):
    assert "no reset" in recover.recover(host.job(code))
    assert host.resets == []


def test_a_closed_board_that_is_not_well_is_reset_all_the_same(host):
    job = host.job(6)
    host.tt_smi(f'[ "$1" = -s ] || mkdir -p {host.folder}/well; [ -d {host.folder}/well ]')
    recover.recover(job)
    assert host.resets == [f"-r {CARD}"]


def test_a_doctor_that_finds_nothing_is_a_finding(host, monkeypatch):
    monkeypatch.setattr(preflight, "recipe", lambda *_words: ["sleep", "60"])
    monkeypatch.setattr(preflight, "DOCTOR_SECONDS", 0.2)
    (found,) = preflight.examine(host.job(), "before")
    assert (found.id, found.ok, found.evidence) == ("doctor", False, "recipe doctor does not end, and finds nothing")
    assert "doctor" in recover.OF_THE_BOARD


def test_what_no_reset_helps_is_no_reason_for_one(host, monkeypatch):
    full, held = Diagnosis("disk.runs", False, "0 GB free"), Diagnosis("board.owner", False, "in use by the next job")
    monkeypatch.setattr(recover, "examine", lambda _job, _name: [full, held])
    assert "no reset" in recover.recover(host.job(75))
    assert "nothing is wrong with it" in recover.recover(host.job(5))
    assert len(host.resets) == 1
    assert not host.quarantine.exists()


def test_resets_are_capped_and_then_the_machine_goes_out_of_service(host):
    host.tt_smi('[ "$1" = -s ]')
    with pytest.raises(MachineError, match="3 resets did not help: tt-smi -r ended with 1") as ended:
        recover.recover(host.job(5))
    assert ended.value.code == 4
    assert host.resets == [f"-r {CARD}"] * 3
    text = host.quarantine.read_text()
    assert re.search(r"^board: n150\nwhen: \d{4}-\d\d-\d\dT\S+Z\nrun: a-run\nwhy: 3 resets did not help", text)
    with pytest.raises(MachineError, match="out of service: board: n150; when: "):
        preflight.refuse_quarantined()


class InTheKernel:
    """A run of the job that no signal ends."""

    run, asked = "a-run", 0

    def end(self, now: bool) -> None:
        self.asked += 1

    def ended(self) -> bool:
        return False


@pytest.fixture
def unkillable(monkeypatch) -> InTheKernel:
    run = InTheKernel()
    monkeypatch.setattr(stop, "going_on", lambda _say: [run])
    monkeypatch.setattr(own, "is_own", lambda _job, _running: True)
    monkeypatch.setattr(stop, "STOP_SECONDS", 0.2)
    return run


def test_a_run_that_cannot_be_killed_takes_the_machine_out_of_service(host, unkillable):
    with pytest.raises(MachineError, match=r"out of service: its run cannot be ended: a-run has not ended after"):
        recover.recover(host.job(5))
    assert "why: its run cannot be ended" in host.quarantine.read_text()
    assert host.resets == []
    assert unkillable.asked == 2


def test_what_the_phase_has_asked_to_end_is_not_asked_again_but_killed(host, unkillable, capsys):
    with pytest.raises(MachineError):
        own.end_own(host.job(75, asked=True))
    assert unkillable.asked == 1
    said = capsys.readouterr().out
    assert said.index("which was asked to end\n") < said.index("\nkilling ")


@pytest.mark.parametrize("recovered", [True, False])
def test_a_run_that_cannot_be_killed_hides_nothing_from_collect(host, unkillable, monkeypatch, recovered):
    monkeypatch.setattr(collect, "examine", lambda job, _name: (job.out / "doctor-after.json").write_text("{}"))
    job = host.job(5)
    job.note(phases={"preflight": {"code": 0, "said": ""}, "train": {"code": 5, "said": "it hung"}})
    machines.write(job.runs / "a-run/report.html", "")
    if recovered:
        assert __main__.main(["recover"]) == 4
    asked = unkillable.asked
    assert __main__.main(["collect"]) == 0
    assert (unkillable.asked == asked) is recovered  # its time is short after a cancel, and this is done
    assert (job.out / "doctor-after.json").is_file()
    assert (job.out / "dmesg.txt").is_file()
    text = (job.out / "summary.md").read_text()
    assert text.startswith("# ")
    assert ("| recover | 4 | the machine is out of service: its run cannot" in text) is recovered


def test_what_a_reset_would_wipe_is_written_down_first(host, monkeypatch):
    machines.write(host.folder / "bin/dmesg", "#!/bin/sh\necho 'tenstorrent 0: hung'\n")
    (host.folder / "bin/dmesg").chmod(0o755)
    seen: list[tuple[str, int]] = []

    def examine(_job: Job, name: str) -> list[Diagnosis]:
        seen.append((name, len(host.resets)))
        return []

    monkeypatch.setattr(recover, "examine", examine)
    job = host.job(5)
    recover.recover(job)
    assert seen == [("failed", 0), ("after-reset-1", 1)]
    assert (job.out / "dmesg-failed.txt").read_text() == "tenstorrent 0: hung\n"


def test_a_reset_that_helps_only_the_second_time_is_two_resets(host):
    host.tt_smi(f'[ "$1" = -s ] || {{ echo x >>{host.folder}/n; [ "$(wc -l <{host.folder}/n)" = 2 ]; }}')
    assert "2 of at most 3" in recover.recover(host.job(5))
    assert len(host.resets) == 2


def test_a_card_that_is_still_gone_after_its_resets_is_not_taken_for_well(host):
    job = host.job(5)
    machines.remove_card(host.root, 0)
    with pytest.raises(MachineError, match=r"board\.nodes: n150 was named but is not on this machine"):
        recover.recover(job)
    assert len(host.resets) == 3


def test_a_quarantine_is_written_once_and_never_overwritten(host):
    machines.write(host.quarantine, "board: n150\nwhy: the first\n")
    host.tt_smi("exit 1")
    with pytest.raises(MachineError, match="out of service"):
        recover.recover(host.job(5))
    assert host.quarantine.read_text() == "board: n150\nwhy: the first\n"


def test_a_quarantine_that_cannot_be_written_is_said(host, monkeypatch):
    machines.write(host.folder / "a-file", "")
    monkeypatch.setenv("RECIPES_QUARANTINE", str(host.folder / "a-file/quarantine"))
    host.tt_smi("exit 1")
    with pytest.raises(MachineError, match="could not be taken out of service") as ended:
        recover.recover(host.job(5))
    assert "take its runner offline by hand" in str(ended.value)


@pytest.mark.parametrize(("lack", "words"), [("tt-smi", "no tt-smi here"), ("address", "not every card has a PCI")])
def test_what_cannot_be_reset_goes_out_of_service(host, monkeypatch, lack, words):
    if lack == "tt-smi":
        host.hide_tt_smi(monkeypatch)
    with pytest.raises(MachineError, match=words):
        recover.recover(host.job(5, **({"cards": []} if lack == "address" else {})))
    assert host.quarantine.is_file()
    assert host.resets == []


def test_a_tt_smi_off_path_in_the_installer_s_environment_resets_too(host, monkeypatch):
    installed = host.hide_tt_smi(monkeypatch)
    machines.write(installed, TT_SMI.format(log=host.folder / "asked", then="exit 0"))
    installed.chmod(0o755)
    recover.recover(host.job(5))
    assert host.resets == [f"-r {CARD}"]


def test_a_galaxy_whose_cards_do_not_reset_one_by_one_is_reset_as_a_whole():
    assert recover.reset_words("galaxy", ["a", "b"], 1) == ["-r", "a,b"]
    assert recover.reset_words("galaxy", ["a", "b"], 2) == ["-glx_reset_auto"]
    assert recover.reset_words("galaxy-bh", ["a", "b"], 2) == ["-glx_reset_auto"]
    assert recover.reset_words("t3k", ["a", "b"], 2) == ["-r", "a,b"]


# --- what never is ----------------------------------------------------------------------------------------------------


def test_a_card_that_somebody_else_leases_is_never_reset(host):
    with (
        lease.taken([CARD], Owner("n150", os.getpid(), "somebody-elses-run")),
        pytest.raises(MachineError, match=r"in use by process .* with the run somebody-elses-run"),
    ):
        recover.recover(host.job(4))
    assert host.resets == []
    assert not host.quarantine.exists()


def test_a_card_that_somebody_else_has_open_is_never_reset(host):
    machines.write(host.root / "proc/driver/tenstorrent/0/pids", f"{os.getpid()}\n")
    with pytest.raises(MachineError, match=f"n150 is in use by process {os.getpid()}"):
        recover.recover(host.job(5))
    assert host.resets == []


def test_a_card_that_somebody_takes_after_a_failed_reset_is_not_reset_again(host, monkeypatch):
    host.tt_smi(f'[ "$1" = -s ] || {{ echo {os.getpid()} >{host.root}/proc/driver/tenstorrent/0/pids; exit 1; }}')
    with pytest.raises(MachineError, match="in use by"):
        recover.recover(host.job(5))
    assert len(host.resets) == 1


def test_the_process_of_this_very_job_is_nobody_else(host):
    machines.write(host.root / "proc/driver/tenstorrent/0/pids", f"{os.getpid()}\n")
    job = host.job(5, process=process(os.getpid()))
    assert own.strangers(job) == []
    recover.reset(job, 1)
    assert host.resets == [f"-r {CARD}"]


RUNS_ON = """
import os, signal, sys
from tools.machine import lease
from tools.machine.lease import Owner
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
with lease.taken(sys.argv[1:], Owner("n150", os.getpid(), "a-run")):
    print("taken", flush=True)
    signal.pause()
"""


@pytest.fixture
def goes_on(host) -> Iterator[subprocess.Popen[bytes]]:
    """A run that has the card, and ends when it is asked to."""
    command = [sys.executable, "-c", RUNS_ON, CARD]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"taken\n"
        yield child
        child.kill()


def test_what_is_left_of_the_jobs_own_run_is_asked_to_end(host, goes_on):
    job = host.job(5, process=process(goes_on.pid))
    recover.recover(job)
    assert goes_on.wait(10) == 75
    assert host.resets == [f"-r {CARD}"]


def test_anybody_elses_run_goes_on(host, goes_on):
    with pytest.raises(MachineError, match="with the run a-run"):
        recover.recover(host.job(5))
    assert goes_on.poll() is None


@pytest.mark.parametrize(("process", "own_one"), [("7@11", True), ("7@12", False)])
def test_a_container_is_the_jobs_own_by_the_process_that_launched_it(host, process, own_one):
    container = launcher.Container("recipes-x", "running", "x", "n150", "", launcher=process, lent="")
    assert own.is_own(host.job(5, process="7@11"), container) is own_one


def test_a_tt_smi_that_hangs_is_killed_with_what_it_started(host, monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "SNAPSHOT_SECONDS", 0.5)
    host.tt_smi(f"sleep 300 & echo $! >{tmp_path}/child; wait")
    found = commands.snapshot(tmp_path / "snapshot.json")
    assert found.ok is False
    assert "has not ended after 0.5 s" in found.evidence
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "what tt-smi started lives on"
        time.sleep(0.05)


# --- before training --------------------------------------------------------------------------------------------------


@pytest.fixture
def sound(monkeypatch) -> None:
    """A doctor that finds nothing wrong, and room."""

    def examine(job: Job, name: str) -> list[Diagnosis]:
        facts = {"why": "n150: found", "host": {"pci": [CARD], "nodes": ["/dev/tenstorrent/0"]}}
        (job.out / f"doctor-{name}.json").write_text(json.dumps(facts))
        return [Diagnosis("board.nodes", True, "here"), Diagnosis("board.memory", None, "not readable")]

    monkeypatch.setattr(preflight, "examine", examine)
    monkeypatch.setattr(doctor_host, "ROOM_GB", 0)


def test_a_sound_machine_passes_and_its_cards_are_noted(host, sound):
    job = host.job(cards=[], nodes=0)
    assert preflight.preflight(job) == "n150: found; nothing is wrong; cannot be told: board.memory"
    assert (job.record["cards"], job.record["nodes"]) == ([CARD], 1)


def test_a_card_that_does_not_answer_tt_smi_is_refused(host, sound):
    host.tt_smi("exit 3")
    with pytest.raises(MachineError, match="tt-smi -s ends with 3") as ended:
        preflight.preflight(host.job())
    assert ended.value.where == "board.answers"


def test_no_room_for_what_the_job_writes_is_refused(host, sound, monkeypatch):
    monkeypatch.setattr(doctor_host, "ROOM_GB", 1e9)
    with pytest.raises(MachineError) as ended:
        preflight.preflight(host.job())
    assert ended.value.where == "disk.out"


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def train(host, monkeypatch) -> Callable[..., str]:
    """The phase, over a `recipe run` that is the given Python."""

    def run(code: str, minutes: float = 1) -> str:
        monkeypatch.setattr(training, "recipe", lambda *words: [sys.executable, "-uc", textwrap.dedent(code), *words])
        monkeypatch.setenv("TRAIN_MINUTES", str(minutes))
        return training.train(host.job())

    return run


LISTENS = """
    import signal, sys, time
    signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(75)))
    print("training")
    time.sleep(60)
"""


def test_a_run_keeps_its_code_and_its_words(train, host, capfd):
    with pytest.raises(RecipeError) as ended:
        train("import sys; print('error: no memory\\n  to do: less', file=sys.stderr); sys.exit(5)")
    assert ended.value.code == 5
    assert "ended with 5: no memory\n  to do: less" in str(ended.value)
    assert "no memory" in capfd.readouterr().out
    assert "no memory" in (host.folder / "out/screen.txt").read_text()


def test_a_run_that_its_watchdog_ends_says_why(train):
    code = "import os; print('step 2\\nstalled in step 3\\n  to do: reset it', flush=True); os._exit(5)"
    with pytest.raises(RecipeError, match="ended with 5: stalled in step 3\n  to do: reset it"):
        train(code)


def test_the_command_is_that_of_the_job(train, host, monkeypatch, capfd):
    monkeypatch.setenv("STEPS", "20")
    train("import sys; print(sys.argv[1:])")
    words = ["run", "from_scratch", "--hw", "n150", "--resume", "never", "--out", f"{host.folder}/out/runs"]
    assert str([*words, "--no-container", "--steps", "20"]) in capfd.readouterr().out


def test_at_its_limit_a_run_is_asked_to_save(train):
    with pytest.raises(RecipeError, match=r"ended with 75, at its limit of 0\.02 minutes") as ended:
        train(LISTENS, minutes=0.02)
    assert ended.value.code == 75


def test_a_run_that_does_not_listen_is_killed(train, monkeypatch):
    monkeypatch.setattr(training, "STOP_SECONDS", 0.5)
    with pytest.raises(RecipeError, match=r"killed by SIGKILL, at its limit .*, killed as it had not ended") as ended:
        train("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)", minutes=0.01)
    assert ended.value.code == 5


def send_once_training(host: Host, *numbers: signal.Signals) -> None:
    """Signals to this process, from a thread, half a second apart, once the run has printed `training`."""
    screen = host.folder / "out/screen.txt"

    def send() -> None:
        while not screen.is_file() or "training" not in screen.read_text():
            time.sleep(0.05)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.6)

    threading.Thread(target=send, daemon=True).start()


def test_a_runner_that_cancels_sends_two_signals_and_the_run_is_asked_once(train, host):
    """Twice asked, it would end without saving."""
    code = """
        import signal, sys, time
        asked = []
        signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
        print("training")
        while not asked:
            time.sleep(0.1)
        time.sleep(2)
        sys.exit(74 + len(asked))
    """

    send_once_training(host, signal.SIGINT, signal.SIGTERM)
    with pytest.raises(RecipeError, match="ended with 75, asked to by SIGINT"):
        train(code)
    assert Job.from_environment().record["asked"] is True


def test_a_run_outlives_the_phase_that_a_runner_kills(host, monkeypatch):
    """It must still save and close its device, and to speak must not break it off."""
    monkeypatch.setenv("NAME", str(FROM_SCRATCH))
    code = """
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1), print("saved"), sys.exit(75)))
        print("training")
        time.sleep(60)
    """
    phase = f"""
        import sys
        from ci.hardware import train
        from ci.hardware.job import Job
        train.recipe = lambda *_: [sys.executable, "-uc", {textwrap.dedent(code)!r}]
        train.train(Job.from_environment())
    """
    job, screen = host.job(), host.folder / "out/screen.txt"
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(phase)], cwd=ROOT) as child:
        until(lambda: screen.is_file() and "training" in screen.read_text())
        child.send_signal(signal.SIGINT)
        until(lambda: "asked" in job.record)
        child.kill()
    until(lambda: "saved" in screen.read_text())


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


def test_a_run_that_cannot_be_killed_does_not_hold_the_phase(train, monkeypatch):
    def cannot(*_words: object, **_options: object) -> None:
        raise MachineError("it has not ended")

    monkeypatch.setattr(training, "end_own", cannot)
    killed: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(training, "kill_group", killed.append)
    monkeypatch.setattr(training, "STOP_SECONDS", 0.2)
    with pytest.raises(RecipeError, match=r"goes on, at its limit .* cannot be killed") as ended:
        train("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)", minutes=0.01)
    assert ended.value.code == 5
    commands.kill_group(killed[0])


def test_a_signal_to_the_phase_is_handed_on(train, host):
    send_once_training(host, signal.SIGINT)
    with pytest.raises(RecipeError, match="asked to by SIGINT") as ended:
        train(LISTENS)
    assert ended.value.code == 75
    assert "saved" in (host.folder / "out/screen.txt").read_text()


# --- the grade --------------------------------------------------------------------------------------------------------

MEASURED: dict[str, Any] = {"board": "n150", "evidence": "measured", "what": "a run"}
HELD: dict[str, Any] = {"figure": "loss at 1", "verdict": "pass", "says": "the same"}
SAME: dict[str, Any] = {"figure": "settings", "verdict": "pass", "says": "the same training"}


@pytest.fixture
def grade(host, monkeypatch) -> Callable[..., str]:
    """The phase, over a `recipe grade` that says and ends so."""

    def run(code: int, **said: object) -> str:
        script = f"import sys; print({json.dumps(said)!r}); print('error: why', file=sys.stderr); sys.exit({code})"
        monkeypatch.setattr(grading, "recipe", lambda *_words: [sys.executable, "-c", script])
        monkeypatch.setattr(grading, "verify", lambda _job: "verified")
        return grading.grade(host.job(0))

    return run


def test_a_pass_says_what_was_held(grade):
    said = grade(0, verdict="pass", lines=[SAME, HELD], entry=MEASURED)
    assert said == "pass: loss at 1, beside a run; verified"


def test_a_fail_is_the_code_of_recipe_grade(grade):
    with pytest.raises(RecipeError, match="why") as ended:
        grade(6, verdict="fail", lines=[SAME, {**HELD, "verdict": "fail"}], entry=MEASURED)
    assert ended.value.code == 6


PUBLISHED = {**MEASURED, "evidence": "published"}
HELD_TO_NOTHING: dict[str, dict[str, Any]] = {
    "nothing recorded": {"verdict": "ungraded", "recorded": []},
    "another board's": {"verdict": "ungraded", "recorded": [{**MEASURED, "board": "n300"}]},
    "published and not held": {"verdict": "pass", "lines": [SAME], "entry": PUBLISHED},
    "published": {"verdict": "pass", "lines": [SAME, HELD], "entry": PUBLISHED},
}
LOST: dict[str, dict[str, Any]] = {
    "of another training": {"verdict": "ungraded", "recorded": [MEASURED]},
    "of no step of this one": {"verdict": "pass", "lines": [{**HELD, "verdict": "not compared"}], "entry": MEASURED},
}


@pytest.mark.parametrize("said", HELD_TO_NOTHING.values(), ids=HELD_TO_NOTHING)
def test_a_board_without_figures_is_ungraded_and_warned_of(grade, said, monkeypatch, capfd):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    words = grade(2 if said["verdict"] == "ungraded" else 0, **said)
    assert words.startswith("UNGRADED: nothing of from_scratch is recorded on n150")
    assert "::warning title=UNGRADED::" in capfd.readouterr().out


@pytest.mark.parametrize("said", LOST.values(), ids=LOST)
def test_a_board_that_has_figures_and_holds_nothing_to_them_is_red(grade, said):
    with pytest.raises(VerificationError, match="has recorded figures, and none is of this training: a run"):
        grade(2 if said["verdict"] == "ungraded" else 0, **said)


def test_a_grade_that_says_nothing_is_no_pass(host, monkeypatch):
    monkeypatch.setattr(grading, "recipe", lambda *_words: [sys.executable, "-c", "import sys; sys.exit('error: no')"])
    with pytest.raises(RecipeError, match="no") as ended:
        grading.grade(host.job(0))
    assert ended.value.code == 1


# --- what is left behind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [True, False])
def test_large_files_are_moved_aside_and_listed(host, monkeypatch, kept):
    monkeypatch.delenv("RECIPES_LEFT_OUT", raising=False)
    if kept:
        monkeypatch.setenv("RECIPES_LEFT_OUT", str(host.folder / "kept"))
    monkeypatch.setattr(collect, "ROOM_MB", 0.01)
    job = host.job(0)
    large, small = job.runs / "a/checkpoints/step-1/model.safetensors", job.runs / "a/metrics.jsonl"
    machines.write(large, "w" * 20_000)
    machines.write(small, "{}\n")
    (line,) = collect.lighten(job)
    assert line.startswith("runs/a/checkpoints/step-1/model.safetensors (0 MB, now in ")
    assert not large.exists()
    assert small.is_file()
    (folder,) = (host.folder / "kept").iterdir() if kept else [host.folder / "out.left-out"]
    assert (folder / "runs/a/checkpoints/step-1/model.safetensors").read_text() == "w" * 20_000
    assert line.endswith("step-1)" if kept else "step-1, and only as long as this checkout is kept)")


def test_a_large_file_that_cannot_be_moved_stays_and_is_said(host, monkeypatch):
    monkeypatch.setattr(collect, "ROOM_MB", 0.01)
    machines.write(host.folder / "a-file", "")
    monkeypatch.setenv("RECIPES_LEFT_OUT", str(host.folder / "a-file/kept"))
    large = host.job(0).runs / "a/model.safetensors"
    machines.write(large, "w" * 20_000)
    (line,) = collect.lighten(Job.from_environment())
    assert "cannot be moved" in line
    assert large.is_file()


def test_the_kernels_log_is_taken_for_what_is_of_a_board(host):
    host.tt_smi()
    machines.write(
        host.folder / "bin/dmesg", "#!/bin/sh\necho 'eth0: address 1'; echo 'tenstorrent 0000:01:00.0: hung'\n"
    )
    (host.folder / "bin/dmesg").chmod(0o755)
    job = host.job(0)
    commands.kernel_log(job.out / "dmesg.txt")
    assert (job.out / "dmesg.txt").read_text() == "tenstorrent 0000:01:00.0: hung\n"


@pytest.mark.parametrize(
    ("phases", "verdict"),
    [
        ({"preflight": {"code": 4, "said": "busy"}}, "FAILED in preflight"),
        ({"preflight": {"code": 0, "said": ""}, "train": {}}, "FAILED in train"),
        ({"train": {"code": 0, "said": ""}, "grade": {"code": 0, "said": "UNGRADED: nothing"}}, "UNGRADED"),
        ({"train": {"code": 0, "said": ""}, "grade": {"code": 0, "said": "pass: loss at 1"}}, "pass"),
        ({"train": {"code": 0, "said": ""}}, "NOT GRADED"),
    ],
)
def test_the_summary_begins_with_what_the_job_comes_to(host, phases, verdict, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(host.folder / "page.md"))
    job = host.job()
    job.note(phases=phases)
    summary.add(job, list(summary.summary(job, [])))
    text = (job.out / "summary.md").read_text()
    assert text.startswith(f"# from_scratch on n150: {verdict}\n")
    assert (host.folder / "page.md").read_text() == text


# --- the job as a whole -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"HW": ""}, "HW is not set"),
        ({"HW": "cpu"}, "cpu has no card"),
        ({"HW": "n151"}, "did you mean n150"),
        ({"NAME": "tinylama"}, "no recipe called 'tinylama'"),
        ({"OUT": ""}, "OUT is not set"),
        ({"RECIPES_CONTAINER": "x"}, "this is a container of a run"),
    ],
)
def test_what_a_job_is_asked_is_checked_first(host, monkeypatch, capsys, changes, words):
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    assert __main__.main(["preflight"]) == 2
    assert words in capsys.readouterr().out
    assert not (host.folder / "out").exists()


def test_phases_come_in_order_and_once(host, capsys):
    assert __main__.main(["train"]) == 2
    assert "train comes after a preflight that went well" in capsys.readouterr().out
    host.job()
    assert __main__.main(["preflight"]) == 2
    assert "a job on n150 has had its preflight here" in capsys.readouterr().out
    assert __main__.main(["polish"]) == 2
    assert "preflight|train|grade|recover|collect" in capsys.readouterr().out


def test_a_phase_that_breaks_is_our_bug_and_written_down(host, monkeypatch, capsys):
    def broken(_job: Job) -> str:
        raise ZeroDivisionError

    monkeypatch.setattr(__main__, "PHASES", {**__main__.PHASES, "collect": broken})
    assert __main__.main(["collect"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert Job.from_environment().phases["collect"]["code"] == 1


def test_after_a_failure_only_recover_and_collect_are_due():
    due = {flags: [step.phase for step in STEPS if step.due(*flags)] for flags in ((False, False), (True, False))}
    assert due[False, False] == ["preflight", "train", "grade", "collect"]
    assert due[True, False] == ["recover", "collect"]  # after a cancel both have five minutes, and a hung board waits
    assert [step.phase for step in STEPS if step.due(False, True)] == ["recover", "collect"]
    assert [step.phase for step in STEPS] == list(__main__.PHASES)


def test_the_workflow_has_these_steps_in_this_order_and_time_for_them():
    if not WORKFLOW.is_file():
        pytest.skip("there is no .github/workflows/hardware.yml yet to compare with")
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"].values()
    found = [
        (phase[1], step.get("if", "").removeprefix("${{ ").removesuffix(" }}"), step["timeout-minutes"])
        for job in jobs
        for step in job.get("steps", ())
        if (phase := re.search(r"ci/hardware\.sh (\w+)", step.get("run", "")))
    ]
    assert [step[:2] for step in found] == [(step.phase, step.when) for step in STEPS]
    for (name, _, minutes), step in zip(found, STEPS, strict=True):
        assert minutes >= step.minutes, f"{name} would be killed before it has ended by itself"
    whole = sum(step.minutes for step in STEPS)
    (job,) = (job for job in jobs if "ci/hardware.sh" in str(job.get("steps")))
    assert job["timeout-minutes"] >= whole
    assert next(step.minutes for step in STEPS if step.phase == "train") > TRAIN_MINUTES
    assert ALWAYS in {step.when for step in STEPS}


@pytest.fixture(autouse=True)
def signals_kept() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in training.SIGNALS}
    yield
    assert before == {number: signal.getsignal(number) for number in training.SIGNALS}


def test_the_job_needs_no_more_than_a_boards_host_has():
    """requirements/launcher.txt: no torch, no numpy."""
    bare = "import sys; sys.modules |= dict.fromkeys(('numpy', 'torch', 'safetensors', 'transformers', 'jinja2'))"
    command = [sys.executable, "-c", f"{bare}; from ci.hardware.__main__ import main; sys.exit(main(['none']))"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "")
    assert "which phase?" in done.stdout
