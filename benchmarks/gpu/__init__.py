"""What a machine with a GPU is asked: whether the laws hold there, what flipout costs, and slices of the paper.

    python -m benchmarks.gpu --device cuda --out runs/gpu            # or: make gpu
    python -m benchmarks.gpu --device cpu --quick --out /tmp/gpu     # a rehearsal without one

Needs torch and numpy, no network and no other package. Sections run by priority and each is saved when it is done, so that the same
command goes on after a kill; those for which no time is left are named in the result. ``flipout report runs/gpu`` shows the folder.
"""
