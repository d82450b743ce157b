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

"""What goes on beside CRIU while the guest is frozen on the source."""

import contextlib
import json
import pathlib
import threading
import time
import typing as ty

from nova_pycontainer.runtime import console_log
from nova_pycontainer.runtime import criu
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import faults
from nova_pycontainer.runtime.migration import channel
from nova_pycontainer.runtime.migration import dumping
from nova_pycontainer.runtime.migration import guest
from nova_pycontainer.runtime.migration import images
from nova_pycontainer.runtime.migration import network_lock
from nova_pycontainer.runtime.migration import protocol
from nova_pycontainer.runtime.migration import undumpable

if ty.TYPE_CHECKING:
    from nova_pycontainer.runtime.migration import source as source_module

#: Seconds for the files or the memory of a guest.
PASS_TIMEOUT = 3600.0
#: Seconds for a word of the destination.
ANSWER_TIMEOUT = 60.0
#: Characters of the frame around what a dump gives.
_MARGIN = 1024
#: The number that CRIU finds its connection for pages at.
_PAGES_FD = 10

Phase = protocol.Phase


class Dump:
    """One dump."""

    def __init__(
        self, source: 'source_module.Source', stack: contextlib.ExitStack,
        pid: int, external: dict[str, str], parent: str | None,
    ) -> None:
        self._source = source
        self._pid = pid
        self._external = external
        self._files, stream = source.open_final()
        stack.callback(self._files.close)
        stack.callback(stream.close)
        #: The pages follow when the guest runs on the destination.
        self.lazy = source.lazy
        #: The round of memory that the dump is the rest of.
        self.parent = None if self.lazy else parent
        fds = {}
        if self.lazy:
            with source.open_pages() as pages:
                fds[_PAGES_FD] = pages.fileno()
                self.session = stack.enter_context(source.session(fds))
            stack.callback(source.close_pages)
        else:
            self.session = stack.enter_context(source.session(fds))
        self._waiter: threading.Thread | None = None
        self._sender = images.Sender(
            source.images, stream, source.limiter)
        stack.callback(self._sender.stop)
        self._files_thread = threading.Thread(
            target=self._copy_files, name='final-pass', daemon=True)
        self._error: BaseException | None = None
        self._ramfs: list[dict[str, ty.Any]] = []
        dumping.check_network(source.item, pid)
        undumpable.check(source.item, pid)
        self._network: dict[str, ty.Any] = {}
        self._frozen_at = 0.0

    def lazy_config(self) -> pathlib.Path:
        """What the RPC has no field for that is honoured."""
        path = self._source.images.with_name(
            f'{self._source.images.name}.conf')
        path.write_text(f'ps-socket {_PAGES_FD}\n')
        return path

    def start(self) -> None:
        self._sender.start()

    def notified(self, script: criu.Script) -> None:
        if script.name == 'network-lock':
            self._frozen()
        elif script.name == 'network-unlock':
            # It gives up, and lets go of the processes next. They have to
            # be set right before they run.
            (self._source.item.cgroup.v2 / 'cgroup.freeze').write_text('1')
            if not self._source.committed:
                network_lock.unblock(self._pid)
        elif script.name == 'post-dump':
            try:
                self._dumped()
            except BaseException:
                # CRIU would serve pages even now, until somebody hangs up.
                self._source.close_pages()
                raise

    def _frozen(self) -> None:
        """Every process is stopped by CRIU now."""
        source = self._source
        self._frozen_at = time.monotonic()
        source.progress.phase = Phase.FROZEN
        faults.point('source.frozen')
        source.moment.frozen(self._pid)
        if source.paused:
            # CRIU runs code of its own in the processes. It holds them, so
            # that nothing of the guest's can run.
            (source.item.cgroup.v2 / 'cgroup.freeze').write_text('0')
        self._files_thread.start()
        self._ramfs = guest.save_ramfs(self._pid)

    def settle(self) -> None:
        """The dump was given up and may be tried again. A pass that is cut
        off would end the migration for the destination.
        """
        if self._files_thread.ident is not None:
            self._files_thread.join(PASS_TIMEOUT)

    def _copy_files(self) -> None:
        try:
            self._network = dumping.network_facts(
                self._source.item, self._pid)
            self._source.link_aliases()
            self._source.final_pass(self._files)
        except BaseException as e:
            self._error = e

    def _dumped(self) -> None:
        source = self._source
        # From here no death of CRIU's can let the guest run.
        (source.item.cgroup.v2 / 'cgroup.freeze').write_text('1')
        faults.point('source.dumped')
        cgroups = guest.save_cgroups(source.item.cgroup)
        with source.progress.timed('images'):
            try:
                self._sender.finish()
            except errors.ContainerError as e:
                raise self._reason(e) from e
        source.progress.memory_sent = source.sent_ahead + self._sender.sent
        source.progress.steps['memory'] = time.monotonic() - self._frozen_at
        self._files_thread.join(PASS_TIMEOUT)
        if self._error is not None:
            raise self._error
        if _has_link_remaps(source.images):
            # CRIU has given names to files that were open and unlinked.
            source.final_pass(None)
        dumped = {
            'external': self._external, 'cgroups': cgroups,
            'ramfs': self._ramfs, 'lazy': self.lazy, 'parent': self.parent,
            **self._network,
            'moment': source.moment.dumped()}
        source.commit(dumped | {'console': console_log.pack(
            source.item.log, source.item.log_bytes,
            channel.MAX_FRAME - len(json.dumps(dumped)) - _MARGIN)})
        if self.lazy:
            # It runs only if CRIU goes on from here and serves its pages.
            self._waiter = threading.Thread(
                target=self._running, name='running', daemon=True)
            self._waiter.start()
        else:
            self._running()
            if self._error is not None:
                raise self._error

    def _reason(self, broken: errors.ContainerError) -> BaseException:
        """Why the destination has cut a connection, if it says so."""
        self._files_thread.join(ANSWER_TIMEOUT)
        return self._error or self._source.reason(broken)

    def _running(self) -> None:
        try:
            self._source.wait_running()
            self._source.progress.frozen = time.monotonic() - self._frozen_at
        except BaseException as e:
            self._error = e
            if not self._source.committed:
                # Nobody will ask for a page any more.
                self._source.close_pages()

    def wait_running(self) -> None:
        """With pages to follow, that it runs is known in another thread."""
        if self._waiter is not None:
            self._waiter.join()
            if self._error is not None:
                raise self._error


def _has_link_remaps(directory: pathlib.Path) -> bool:
    # An image with no entries is its 4 bytes of magic.
    try:
        return (directory / 'remap-fpath.img').stat().st_size > 4
    except FileNotFoundError:
        return False
