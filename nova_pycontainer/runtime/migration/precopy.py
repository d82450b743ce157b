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


"""Memory that is sent while the guest runs.

CRIU's ``pre-dump`` stops the guest only to mark its pages as clean and to
take hold of what it has (:mod:`.standstill`); then it writes that while the
guest goes on. The next, and the dump, hold what was written to since
(``CONFIG_MEM_SOFT_DIRTY``) and lead to the one before by a link ``parent``,
of which CRIU reads the rest: https://criu.org/Incremental_dumps.

Round N lies in the directory N beside the images of the dump, on both hosts.
"""

import contextlib
import pathlib
import shutil
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import faults
from nova_pycontainer.runtime.migration import channel
from nova_pycontainer.runtime.migration import images
from nova_pycontainer.runtime.migration import standstill

if ty.TYPE_CHECKING:
    from nova_pycontainer.runtime.migration import source as src

LOG = logging.getLogger(__name__)

#: The channel's role of a round's images.
ROLE: ty.Final = 'memory'
#: CRIU's name of what the kernel has to be able to do.
FEATURE: ty.Final = 'mem_dirty_track'
#: Bytes. Less is dumped sooner than two rounds are begun.
WORTHWHILE: ty.Final = 128 << 20
_MAX_ROUNDS = 8
#: A round that is larger than this part of the one before: the guest writes
#: as fast as we send.
_CONVERGES = 0.7
_ROUND_TIMEOUT = 3600.0


def wanted(
    strategy: str, *, here: ty.Callable[[], str | None], there: bool,
    memory: int,
) -> bool:
    """Whether the memory is to be sent ahead.

    :param strategy: of the migration's options
    :param here: what this host's kernel lacks for it
    :param there: whether the destination knows what to do with it
    :param memory: bytes that the guest takes
    :raises ContainerError: ``unsupported``: it was asked for by name
    """
    if strategy == 'auto':
        return there and memory >= WORTHWHILE and here() is None
    if strategy != 'pre-copy':
        return False
    lacking = here()
    if lacking is not None:
        raise errors.ContainerError(
            'unsupported', 'the kernel of this host does not track which '
            'pages a guest writes to', cause=lacking,
            remedy='Use a kernel with CONFIG_MEM_SOFT_DIRTY, or another '
                   'strategy')
    if not there:
        raise errors.ContainerError(
            'unsupported', 'the destination does not take memory ahead',
            remedy='Upgrade nova-pycontainer there, or use another strategy')
    return True


class _Enough(Exception):
    """The guest is to be frozen, and its pages follow then."""


class Rounds:
    """The source's side."""

    def __init__(self, source: 'src.Source', max_downtime: float) -> None:
        """:param max_downtime: seconds for which the guest may stand still"""
        self._source = source
        self._max_downtime = max_downtime
        #: Bytes that were sent, over all rounds.
        self.sent = 0
        self._stood = 0.0

    def run(self) -> str | None:
        """Send the memory until what is left is little, or does not get less.

        :returns: the directory that the dump is to lead to; None: there is
            none, because CRIU cannot do it with this guest now
        """
        previous = 0
        for number in range(1, _MAX_ROUNDS + 1):
            self._source.check_abort()
            if self._source.forced:
                return str(number - 1) if number > 1 else None
            began = time.monotonic()
            try:
                sent = self._round(number)
            except _Enough:
                return None
            except errors.ContainerError as e:
                if e.code != 'criu_failed':
                    raise
                # What the dump itself cannot do, it says better.
                LOG.warning('instance %s: its memory is not sent ahead: %s',
                            self._source.item.uuid, e)
                return None
            took = time.monotonic() - began
            LOG.info('instance %s: round %d: %d bytes of memory in %.2f s, '
                     'for %.3f s of which it stood still',
                     self._source.item.uuid, number, sent, took, self._stood)
            if took <= self._max_downtime or (
                    number > 1 and sent > previous * _CONVERGES):
                break
            previous = sent
        return str(number)

    def _round(self, number: int) -> int:
        source = self._source
        directory = source.images / str(number)
        directory.mkdir(mode=0o755)
        with contextlib.ExitStack() as stack:
            connection = source.open_round(number)
            stack.callback(connection.close)
            sender = images.Sender(directory, connection, source.limiter)
            stack.callback(sender.stop)
            options = source.round_options(
                directory, f'../{number - 1}' if number > 1 else None)
            sender.start()
            try:
                response = self._pre_dump(options)
                if not response.success:
                    raise source.criu_failed(directory, response)
                sender.finish(self._check)
            except (_Enough, errors.ContainerError):
                sender.stop()
                source.round_taken()
                raise
            source.round_taken()
        self.sent += sender.sent
        return sender.sent

    def _pre_dump(self, options: ty.Any) -> ty.Any:
        source = self._source
        still = standstill.Standstill(
            source.item.cgroup, source.moment, options.pid)
        # If CRIU was killed, all of it has to be before the guest is let go.
        with still, source.session({}) as session:
            still.begin()
            faults.point('source.round')
            response = session.request(
                source.rpc.PRE_DUMP, options, lambda script: None,
                _ROUND_TIMEOUT)
        self._stood = still.lasted
        return response

    def _check(self) -> None:
        self._source.check_abort()
        self._source.check_peer()
        if self._source.lazy:
            raise _Enough


class Received:
    """The destination's side.

    :param directory: of the images of the dump
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self._directory = directory
        self._last = 0

    def take(
        self, number: int, connection: channel.Connection,
        progress: ty.Callable[[int], None],
    ) -> int:
        """Take one round.

        :returns: its bytes
        :raises ContainerError: ``invalid``, ``no_space``, ``network``
        """
        if number != self._last + 1 or number > _MAX_ROUNDS:
            raise errors.ContainerError(
                'invalid', f'the source sends round {number} after '
                f'{self._last}')
        place = self._directory / str(number)
        place.mkdir(mode=0o755)
        if self._last:
            (place / 'parent').symlink_to(f'../{self._last}')
        size = images.receive(place, connection, progress)
        if size is None:
            # CRIU could not. There will be no other, and the dump is whole.
            self._forget()
            return 0
        self._last = number
        return size

    def link(self, parent: object) -> None:
        """Make what the dump leads to what it says that it leads to.

        :param parent: what the source says; None: nothing
        :raises ContainerError: ``invalid``
        """
        if parent is None:
            self._forget()
        elif parent == str(self._last) and self._last:
            (self._directory / 'parent').symlink_to(parent)
        else:
            raise errors.ContainerError(
                'invalid', f'the dump leads to round {parent!r}')

    def _forget(self) -> None:
        self._last = 0
        for number in range(1, _MAX_ROUNDS + 1):
            place = self._directory / str(number)
            if place.exists():
                shutil.rmtree(place)
