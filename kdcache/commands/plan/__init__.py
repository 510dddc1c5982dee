"""`kdcache plan`: what a cache would cost and how good its targets would be, before it is built.

The teacher runs in this process on rows from all over the corpus. Each slice of logits goes through
every codec of the grid; the packed targets are written as a real shard, whose bytes are counted,
and some positions are compared with the full distribution (`fidelity`).

*Hours* are positions of the corpus times the seconds that teacher and codec took a position here,
divided by the workers: workers like this process, nothing waiting for anything else.

*Break-even* is the number of students, one pass over the corpus each, from which on building a
cache and reading it costs less time than running the teacher beside every student. A student's step
is assumed to cost what the teacher's forward costs (forward and backward of a student a third of
its size), and decoding to go on behind that step: only what it takes longer counts.

Cost: one forward of the sample and, for each codec, an encoding of it; the comparison is made for
2,048 positions at most.
Guarantee: apart from the timings, the same command gives the same figures.
"""
