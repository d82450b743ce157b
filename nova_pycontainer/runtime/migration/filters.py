# Licensed under the Apache License, Version 2.0 (the "License"); you may
# not use this file except in compliance with the License. You may obtain
# a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS, WITHOUT
# WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the
# License for the specific language governing permissions and limitations
# under the License.

"""Filters of system calls, seccomp(2), that processes of a guest have.

All have the one that the guest was begun with. Whoever has another one may be
ended for a call that he does not make himself.
"""

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime import process

_INIT = 1

#: Mode, and number of filters; the kernel counts them since 5.9.
Filters = list[bytes]


def of(pid: int) -> Filters:
    """Those of a process's main thread.

    :raises OSError: it has ended
    """
    # A name may be any bytes, but has no line ends.
    with open(f'/proc/{pid}/status', 'rb') as status:
        return [line for line in status
                if line.startswith((b'Seccomp:', b'Seccomp_filters:'))]


def usual(group: cgroup.Cgroup) -> Filters | None:
    """Those of a guest's init.

    :returns: None: it has ended
    """
    for pid in group.processes():
        try:
            numbers = process.numbers(pid)
            # Not that of a namespace below the guest's.
            if len(numbers) == 2 and numbers[1] == _INIT:
                return of(pid)
        except OSError:
            continue
    return None


def check(pid: int, expected: Filters | None) -> None:
    """See that a process may make system calls for somebody else.

    :param expected: what :func:`usual` has found
    :raises OSError: it has ended, or has filters of its own
    """
    if of(pid) != expected:
        raise OSError('it filters its own system calls')
