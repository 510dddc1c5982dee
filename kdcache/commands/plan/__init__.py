"""`kdcache plan`: what a cache would cost and how good its targets would be, before it is built.

The teacher runs in this process on rows from all over the corpus. Each slice of logits goes through
every codec of the grid; the packed targets are written as a real shard, whose bytes are counted,
and some positions are compared with the full distribution (`fidelity`).

*Hours* are the corpus's positions times the measured seconds a position of teacher and codec,
divided by the workers. It assumes workers like this process that never wait for each other.

*Break-even* is the number of students, one pass over the corpus each, from which on building and
reading a cache costs less time than running the teacher with every student. A student's step is
assumed to cost what the teacher's forward costs (forward and backward of a student a third of its
size), and decoding to run in parallel with that step: only the excess counts.

Cost: one forward of the sample and, for each codec, an encoding of it; at most 2,048 positions are
compared.
Guarantee: apart from the timings, the same command gives the same figures.
"""
