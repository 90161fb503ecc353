"""`make rehearse HW=n300 [FAULT=hung-step]`: the whole hardware job on a machine without a card.

The phases are those of ci/hardware, unchanged, each a process of its own by `ci/hardware.sh`, in the order and under
the conditions of its STEPS. What they meet is made here, in a temporary folder: device files of the board
(RECIPES_SYSFS_ROOT), the doubles of ttml and ttnn in place of the libraries, no container, a recipe of a few seconds,
and a `tt-smi` that writes down what it is asked. A fault is planted in these surroundings, never in what is tested.
"""
