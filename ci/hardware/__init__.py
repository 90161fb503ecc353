"""The hardware job: train a recipe on this host's board, grade it, and leave the board fit for the next job.

`ci/hardware.sh PHASE` runs one phase; a workflow has one step for each. It needs the host's Python with
requirements/launcher.txt, no torch. From the environment:

    HW                   the board, a name of hardware.yaml that has cards
    NAME, STEPS          the recipe, and its optimizer steps (empty: as its config says)
    OUT                  a folder for this job alone; all that is in it after `collect` may be published
    CONTAINER=0          without the image, on this machine's own Python (as for make)
    TRAIN_MINUTES        what training may take, 180; then it is asked to save and stop
    RECIPES_LEFT_OUT     a folder that outlives the job, for what is too large to publish. Nobody clears it but its
                         owner. Without one it goes beside OUT, and on a runner with the checkout
    RECIPES_QUARANTINE   the file that takes this machine out of service: /var/lib/recipes-runner/quarantine

`OUT/job.json` tells each phase what the earlier ones did. Exit codes are those of `recipe`. What runs when is STEPS:
`when` is the `if:` of the workflow's step, and what `make rehearse` goes by. A step of the workflow must become its
phase (`run: exec ci/hardware.sh train`): a runner signals the step's shell alone, which hands nothing on.

    preflight   refuses with the finding's name (4): quarantined, wrong or busy board, old firmware, no room, a
                tt-smi that does not answer
    train       ends with the run's own code; at its limit or on a signal the run is asked to save and stop (75)
    grade       6 where a figure fails, and where the board has recorded figures of which this training has none.
                A board without any is UNGRADED: green, as nothing failed, with a warning and that word in the summary
                in place of "passed". It must not be red: nobody could then tell a board that broke from one that
                nobody has graded yet, and the first graded run would have to come from a red job
    recover     only after a failure, and before collect: after a cancel, GitHub gives all that is left five minutes. A
                board that this job did not train on, or that somebody else has, is never reset. Else the run is
                stopped; a board whose run did not close it is reset by PCI address, up to three times, each followed
                by preflight's look at the board, then quarantined (4), as it is where the run cannot be killed. What
                a reset would wipe is written down first: dmesg-failed.txt, doctor-failed.json
    collect     figures, report, logs, the machine before and after, summary.md; large files are left out, and listed
"""

from __future__ import annotations

from dataclasses import dataclass

TRAIN_MINUTES = 180


@dataclass(frozen=True)
class Step:
    """A phase, the `if:` of its step in the workflow (empty: after success alone), and what it may take at most.

    The workflow's own limit must not be shorter: a phase that is killed leaves a board open.
    """

    phase: str
    when: str
    minutes: int

    def due(self, failed: bool, cancelled: bool) -> bool:
        """Whether the step runs after steps of which one failed, or that were cancelled."""
        return {"": not (failed or cancelled), ALWAYS: True, AFTER_FAILURE: failed or cancelled}[self.when]


ALWAYS, AFTER_FAILURE = "always()", "failure() || cancelled()"
STEPS = (
    Step("preflight", "", 5),
    Step("train", "", TRAIN_MINUTES + 8),  # stopping takes two minutes, killing what does not listen as long again
    Step("grade", "", 15),
    Step("recover", AFTER_FAILURE, 20),
    Step("collect", ALWAYS, 10),
)
