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

"""After a dump that was given up: sleeps of the source go on.

CRIU lets the processes go on as it would have restored them: those that
slept have got EINTR, see :mod:`.registers`. The container is frozen before
CRIU lets go of it, so that nobody has seen that yet; then each such thread is
stopped once more, by us, and its registers are corrected.
"""

import collections.abc as cabc
import os
import re
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime.migration import registers
from nova_pycontainer.runtime.migration import tracer
from nova_pycontainer.runtime import procfs

LOG = logging.getLogger(__name__)

_STATUS = re.compile(
    r'^(SigPnd|ShdPnd|SigBlk|SigCgt|Seccomp_filters):\s*(\w+)$', re.M)


class Sleep(ty.NamedTuple):
    """A thread that slept when it was frozen.

    :param thread: its directory in /proc
    :param where: arguments of its call, stack pointer and next instruction
    :param call: the number of its call
    :param facts: see :meth:`.sleepers.Sleepers.frozen`
    """

    thread: str
    where: str
    call: int
    facts: registers.Facts


def resume(
    sleeps: cabc.Iterable[Sleep], now: int, init: int
) -> None:
    """Let sleeps go on. The container is frozen, and no longer traced.

    :param now: the guest's CLOCK_MONOTONIC, in ns
    :param init: pid of the container's init
    """
    if not tracer.supported():
        # The kernel itself rewinds what it has interrupted.
        return
    usual = _status(f'/proc/{init}').get('Seccomp_filters')
    for sleep in sleeps:
        try:
            _resume(sleep, now, usual)
        except OSError as e:
            # It has ended, or never stops: killed, or in the kernel.
            LOG.info('%s does not sleep on: %s', sleep.thread, e)


def _status(thread: str) -> dict[str, str]:
    return dict(_STATUS.findall(procfs.text(f'{thread}/status')))


def _resume(sleep: Sleep, now: int, usual: str | None) -> None:
    tid = int(os.path.basename(sleep.thread))
    status = _status(sleep.thread)
    pending, private, blocked, caught = (
        int(status.get(n, '0'), 16)
        for n in ('ShdPnd', 'SigPnd', 'SigBlk', 'SigCgt'))
    with tracer.stopped(tid) as thread:
        regs = thread.registers()
        pointers = [int(n, 16) for n in sleep.where.split()[-2:]]
        if [regs.sp, regs.ip] != pointers:
            # It has gone on.
            return
        before = regs.orig_ax
        regs.orig_ax = sleep.call
        if registers.Registers(
                regs, sleep.facts, status.get('Seccomp_filters') == usual,
                now, bool((pending | private) & ~blocked & caught),
                regs.compat).patch():
            regs.orig_ax = before
            thread.set_registers(regs)
