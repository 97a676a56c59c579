"""More groups than MPI has communicators: of one communicator, and of some that are freed.

python -m members.many_groups
"""

import numpy as np
from mpi4py import MPI

import batchnorm as bn

GROUPS = 2500

for i in range(GROUPS):
    of_one = bn.distributed.mpi()
    comm = MPI.COMM_WORLD.Dup()
    of_another = bn.distributed.mpi(comm)
    if i % 500 == 0:
        for group in (of_one, of_another):
            _, stats = bn.batch_norm(np.ones((3, 2)), group=group)
            assert stats.count[0] == 3 * group.size
    comm.Free()
