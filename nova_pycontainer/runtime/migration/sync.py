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

"""Copy a container's own files (the overlay's upper) to another host.

rsync does it: its daemon on the source, locked into the directory by
chroot(2), because the guest changes that directory while it is read; its
client on the destination, where the directory is at rest. Both talk through
sockets that the caller connects.

A copy is made in passes. The first one copies all, the next ones what has
changed since, the last one runs while the guest is frozen and must find
everything. rsync skips a file whose size and time of modification are the
same on both sides. That misses

* contents that were replaced and the time set back (``cp -p``, packages whose
  files all have one time),
* stores through a shared mapping: the kernel takes the time when a page
  becomes dirty, not at the stores that follow until it has been written out,
* hard links that were separated: the destination's names would stay linked,
  and one would be written through the other.

So each pass begins with a *preamble* from the source: the files whose inodes
have changed (ctime, which no guest can set) since the first pass began, and
the hard links. The destination spoils the time of the former, unless an
earlier pass has done so since their last change, so that rsync compares their
contents; and it separates what is no longer linked. Each pass but the last
begins by writing dirty pages out, so that stores from then on are seen.
"""

import dataclasses
import os
import pathlib
import signal
import socket
import time
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import layers
from nova_pycontainer.runtime.migration import sync_links
from nova_pycontainer.runtime.migration import sync_preamble
from nova_pycontainer.runtime.migration import sync_rsync

LOG = logging.getLogger(__name__)

_CONFIG = pathlib.Path(__file__).with_name('rsyncd.conf')
_PATH_VARIABLE = 'PYCONTAINER_SYNC_PATH'
#: Nothing has changed since then.
_FUTURE = '@99999999999'

#: Attributes that stay on their host. The three of overlayfs name inodes of
#: the source's file systems. Access control lists go another way (-A), and
#: security labels belong to the policy of a host; capabilities to the guest.
_COMMON_FILTERS: ty.Final = (
    '+x security.capability', '-x security.*', '-x system.*')
UPPER_FILTERS: ty.Final = (
    '-x trusted.overlay.origin', '-x trusted.overlay.uuid',
    '-x trusted.overlay.nlink', *_COMMON_FILTERS)
#: A layer has no attributes that overlayfs would heed.
LAYER_FILTERS: ty.Final = ('-x trusted.*', *_COMMON_FILTERS)

#: Runs as rsync's remote shell: it connects rsync's pipes with the socket.
#: It ends when the other side does, as ssh would. Its exit code would hide
#: rsync's own, which says more.
_CONNECT = ("sh -c 'exec 3<&0 2>/dev/null; cat <&3 >&7 3<&- & "
            "cat <&7 3<&- 7<&-; exit 0'")


@dataclasses.dataclass(frozen=True)
class Mark:
    """A moment on this host: seconds, by two clocks."""

    realtime: float
    monotonic: float

    @classmethod
    def now(cls) -> 'Mark':
        return cls(time.time(), time.monotonic())

    def earliest(self) -> float:
        """No file that changed after this moment has an earlier ctime, even
        if the clock was set back since.
        """
        now = Mark.now()
        step = (now.realtime - self.realtime) - (
            now.monotonic - self.monotonic)
        return self.realtime + min(step, 0.0) - sync_preamble.CLOCK_MARGIN


class Server:
    """The source's end of one pass. It ends when the pass does.

    :ivar mark: what the next pass has to be told as ``since``
    """

    def __init__(
        self, directory: pathlib.Path, sock: socket.socket, *,
        since: Mark | None, final: bool, steady: bool = False,
        tied: bool = False,
    ) -> None:
        now = Mark.now()
        self._directory = directory
        self.mark = since or now
        argv = [
            'sh', '-c', sync_preamble.SCRIPT, 'sh',
            '' if final or steady else 'sync',
            *(('all', _FUTURE) if since is None else
              ('since', f'@{since.earliest():.3f}')),
            f'{now.realtime:.3f}',
            sync_rsync.RSYNC, '--server', '--daemon',
            f'--config={_CONFIG}', '.']
        self._process = sync_rsync.Process(
            argv, sock, cwd=directory, talks=True, nice=not final, tied=tied,
            env={_PATH_VARIABLE: str(directory)})

    def close(self) -> None:
        """Stop serving. Idempotent."""
        if self._process.closed:
            return
        try:
            code = self._process.kill()
        except errors.ContainerError:
            code = 0  # said by what follows
        if code not in (0, -signal.SIGKILL, sync_rsync.PROTOCOL,
                        *sync_rsync.INCOMPLETE):
            # The destination knows it too, if rsync has come so far.
            LOG.warning('serving %s ended with exit code %d: %s',
                        self._directory, code,
                        sync_rsync.summary(self._process.complaint()))
        self._process.close()


def serve(
    directory: pathlib.Path, sock: socket.socket, *,
    since: Mark | None = None, final: bool = False, tied: bool = False,
) -> Server:
    """Let the other end of ``sock`` read a directory, once.

    :param directory: an upper, or a layer's root
    :param sock: a connected stream; the caller may close it at once
    :param since: ``mark`` of the server of the pass before; None: any file
        may have changed
    :param final: the guest is frozen
    :param tied: the other end is on this host; see :class:`sync_rsync.Process`
    :returns: to be closed when the other end has what it wants
    """
    return Server(directory, sock, since=since, final=final, tied=tied)


def serve_layer(
    store: layers.LayerStore, key: str, sock: socket.socket
) -> Server:
    """Let the other end of ``sock`` read a layer, once.

    :raises ContainerError: ``layer_missing``
    """
    root = store.require(key).root
    return Server(root, sock, since=None, final=False, steady=True)


def fetch_layer(
    store: layers.LayerStore, data: ty.Mapping[str, ty.Any],
    connected: ty.Callable[[], ty.ContextManager[socket.socket]], *,
    timeout: float = 3600.0, idle_timeout: float = 60.0,
    cancelled: ty.Callable[[], bool] = lambda: False,
) -> layers.LayerInfo:
    """Copy a layer of another host, unless it is here already.

    :param data: its description on the source (``LayerInfo.to_dict``)
    :param connected: called if it has to be copied: the socket at which it
        is served
    :param cancelled: whether to wait no longer for another copy of it that
        is under way
    :raises ContainerError: see :meth:`Copy.fetch` and
        :meth:`~nova_pycontainer.runtime.layers.LayerStore.adopt`
    """

    def fill(root: pathlib.Path) -> None:
        with connected() as sock:
            stats = Copy(root).fetch(
                sock, timeout=timeout, idle_timeout=idle_timeout,
                filters=LAYER_FILTERS)
        if not stats.complete:
            raise errors.ContainerError(
                'internal', 'the layer could not be read as a whole',
                remedy='See the log of pycontainer-agent on the source')

    return store.adopt(data, fill, cancelled)


class Copy:
    """The destination's directory, over all passes of one migration.

    It is not mounted as part of an overlay, and nobody else changes it.
    """

    def __init__(self, directory: pathlib.Path) -> None:
        self._directory = directory
        #: All that it says has been looked into, and nothing could change
        #: unseen after it.
        self._earlier: sync_preamble.Preamble | None = None

    def fetch(
        self, sock: socket.socket, *, final: bool = False,
        timeout: float = 3600.0, idle_timeout: float = 60.0,
        filters: ty.Sequence[str] = UPPER_FILTERS, tied: bool = False,
    ) -> sync_rsync.Stats:
        """Make the directory the same as the one served at ``sock``.

        To stop early, shut the socket down.

        :param final: the source is at rest, so the copy must be complete
        :param timeout: seconds for all of it
        :param idle_timeout: seconds without anything received or sent
        :raises ContainerError: ``no_space``, ``network`` (the other side went
            away), ``timeout``, ``internal``; the directory is good for
            another pass then, and for nothing else
        """
        began = time.monotonic()
        deadline = began + timeout
        preamble, options = self._prepare(
            sock, final, deadline, idle_timeout)
        if sync_rsync.version() >= sync_rsync.SAFE_INPLACE:
            # A large file of which a little has changed needs neither its
            # space twice nor the writing of all of it.
            options.append('--inplace')
        rsync = [
            sync_rsync.RSYNC, '-aHAXS', '--numeric-ids',
            # To the nanosecond; by itself it compares seconds.
            '--modify-window=-1',
            '--open-noatime', '--stats', '--no-human-readable',
            f'--timeout={max(1, round(idle_timeout))}', *options,
            *(f'--filter={rule}' for rule in filters),
            '--blocking-io', '-e', _CONNECT, 'source::files/',
            f'{self._directory}/']
        argv = ['sh', '-c', 'exec "$@" 7<&0 </dev/null', 'sh', *rsync]
        child = sync_rsync.Process(
            argv, sock, cwd=pathlib.Path('/'), talks=False, nice=not final,
            tied=tied)
        try:
            ended = child.wait(deadline - time.monotonic())
            code = child.kill()
            if not ended:
                raise _timeout('the copy of the files', timeout)
            sync_rsync.judge(code, child.complaint(), final)
            stats = sync_rsync.stats(
                child.output(), code, time.monotonic() - began)
        finally:
            child.close()
        if preamble.complete and not final:
            # A final pass does not write dirty pages out, so a later store
            # to one of them would leave no trace.
            self._earlier = preamble
        return stats

    def _prepare(
        self, sock: socket.socket, final: bool, deadline: float,
        idle_timeout: float,
    ) -> tuple[sync_preamble.Preamble, list[str]]:
        """Read the preamble and do what it says.

        :returns: it, and more options for rsync
        """
        with os.scandir(self._directory) as entries:
            empty = next(entries, None) is None
        with sync_links.Finder(self._directory) as finder:
            preamble = sync_preamble.Preamble.read(
                sock, deadline, idle_timeout if final else None)
            if final and not preamble.complete:
                raise errors.ContainerError(
                    'internal', 'the source cannot list its files',
                    remedy='See the log of pycontainer-agent on the source')
            if empty:
                return preamble, []
            # Deleting first makes room for what is new.
            options = ['--delete-before']
            root = os.open(
                self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                sync_links.separate(
                    root, finder.groups(deadline), preamble.links)
                if preamble.everything or self._earlier is None:
                    options.append('--ignore-times')
                else:
                    sync_preamble.spoil(
                        root, *preamble.unseen(self._earlier))
            finally:
                os.close(root)
        return preamble, options


def fetch(
    sock: socket.socket, directory: pathlib.Path, *, final: bool = False,
    timeout: float = 3600.0, idle_timeout: float = 60.0,
) -> sync_rsync.Stats:
    """One pass by itself; see :meth:`Copy.fetch`."""
    return Copy(directory).fetch(
        sock, final=final, timeout=timeout, idle_timeout=idle_timeout)


def _timeout(what: str, seconds: float) -> errors.ContainerError:
    return errors.ContainerError(
        'timeout', f'{what} did not end within {seconds:.0f} s',
        remedy='Look at the load of both hosts and of the network between '
               'them')
