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

"""Two hosts' directories of one instance, and real overlays over them."""

import collections
import contextlib
import hashlib
import os
import pathlib
import shutil
import signal
import socket
import stat
import tempfile
import threading
import time
import uuid

from nova_pycontainer.runtime import disk
from nova_pycontainer.runtime.migration import sync
from nova_pycontainer.runtime.migration import sync_links
from nova_pycontainer.runtime import overlay
from tests import cases
from tests import leaks

WORK = pathlib.Path(os.environ.get(
    'NOVA_PYCONTAINER_WORK', '/var/tmp/nova-pycontainer'))
#: Ends a test that hangs; nothing is measured by it.
PATIENCE = 120.0
MIB = 1 << 20
#: First host id of the guest.
BASE = 0x61000000
#: What may differ between hosts.
HOST_XATTRS = {'trusted.overlay.origin', 'trusted.overlay.uuid',
               'trusted.overlay.nlink'}


def _content(path, info):
    if stat.S_ISLNK(info.st_mode):
        return os.readlink(path)
    if stat.S_ISREG(info.st_mode):
        with open(path, 'rb') as f:
            return hashlib.file_digest(f, 'sha256').hexdigest()
    return None


def tree(top, *, view=False):
    """All that there is to know of the files below a directory.

    :param view: it is what a guest sees. In an upper the number of names
        counts the one in the overlay's index, too
    """
    top = os.fsencode(top)
    found = {}
    names = collections.defaultdict(list)

    def look(path):
        name = path[len(top):]
        info = os.lstat(path)
        xattrs = {key: os.getxattr(path, key, follow_symlinks=False)
                  for key in os.listxattr(path, follow_symlinks=False)
                  if key not in HOST_XATTRS}
        directory = stat.S_ISDIR(info.st_mode)
        whiteout = stat.S_ISCHR(info.st_mode) and info.st_rdev == 0
        found[name] = {
            'mode': oct(info.st_mode), 'owner': (info.st_uid, info.st_gid),
            'size': None if directory else info.st_size,
            'rdev': info.st_rdev, 'xattrs': xattrs,
            'nlink': info.st_nlink if view and not directory else None,
            'mtime': None if whiteout else info.st_mtime_ns,
            'content': _content(path, info)}
        # Overlayfs makes whiteouts one inode, or several, as it likes.
        if not directory and not whiteout:
            names[info.st_dev, info.st_ino].append(name)
        if directory:
            with os.scandir(path) as entries:
                for entry in sorted(entries, key=lambda e: e.name):
                    look(entry.path)

    look(top)
    for group in names.values():
        for name in group:
            found[name]['same'] = tuple(group)
    return found


class Side:
    """The directories of one host."""

    def __init__(self, directory, layer, method):
        self.layer = layer
        directory.mkdir()
        self.disk = disk.Disk(directory, method, BASE, 32 * MIB)
        self.disk.create()
        self.disk.mount()
        self.upper, self.work = self.disk.upper, self.disk.work
        self.root = directory / 'root'
        self.mounted = False

    def mount(self):
        # A layer is older than what becomes of its files; the clock of files
        # ticks every 10 ms, or more often.
        time.sleep(0.02)
        overlay.mount(self.root, layer=self.layer, upper=self.upper,
                      work=self.work, base_id=BASE)
        self.mounted = True

    def unmount(self):
        if self.mounted:
            overlay.unmount(self.root)
            self.mounted = False

    def clear(self):
        """What a host does when the instance has gone."""
        for path in (self.upper, self.work):
            shutil.rmtree(path)
        self.disk.mount()

    def close(self):
        self.unmount()
        self.disk.unmount()


class Valve:
    """Carries bytes between two sockets; stops where a test wants it to.

    :param limit: bytes from the source after which it waits
    """

    def __init__(self, source, destination, limit=None):
        self._ends = source, destination
        self._limit = limit
        self.carried = 0
        self.stopped = threading.Event()
        self.go = threading.Event()
        self._threads = [
            threading.Thread(target=self._pump, args=args, daemon=True)
            for args in ((source, destination, True),
                         (destination, source, False))]
        for thread in self._threads:
            thread.start()

    def _pump(self, reader, writer, limited):
        try:
            while data := reader.recv(1 << 16):
                if limited:
                    self.carried += len(data)
                    if self._limit is not None and (
                            self.carried > self._limit):
                        self.stopped.set()
                        self.go.wait(PATIENCE)
                writer.sendall(data)
            writer.shutdown(socket.SHUT_WR)
        except OSError:
            with contextlib.suppress(OSError):
                writer.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.go.set()
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE)
        for end in self._ends:
            end.close()


class Case(cases.TestCase):
    """``self.a`` is the source, ``self.b`` the destination."""

    #: of limiting the disk; "loop" gives each upper a file system of 32 MiB
    method = 'none'

    def setUp(self):
        super().setUp()
        if os.geteuid() != 0:
            self.skipTest('mounts need root; run tools/run_tests.sh')
        self.marker = f'sync-test-{uuid.uuid4().hex[:12]}'
        check = leaks.LeakCheck(self.marker)
        check.setUp()
        self.addCleanup(check.cleanUp)
        self.base = pathlib.Path(tempfile.mkdtemp(
            prefix=f'{self.marker}-', dir=WORK if WORK.is_dir() else None))
        self.addCleanup(shutil.rmtree, self.base)
        # Every process of a pass inherits this, whatever its name.
        before = os.environ['PATH']
        self.addCleanup(os.environ.__setitem__, 'PATH', before)
        os.environ['PATH'] = f'{before}:/{self.marker}'
        self.addCleanup(self._check_processes)
        self.layer = self.base / 'layer'
        self.layer.mkdir()
        self.a, self.b = (Side(self.base / name, self.layer, self.method)
                          for name in ('a', 'b'))
        self.addCleanup(self.a.close)
        self.addCleanup(self.b.close)
        self.copy = sync.Copy(self.b.upper)
        self.mark = None

    def processes(self):
        found = []
        for path in pathlib.Path('/proc').glob('[0-9]*/environ'):
            try:
                if self.marker.encode() in path.read_bytes():
                    found.append(int(path.parent.name))
            except OSError:
                pass
        return [pid for pid in found if pid != os.getpid()]

    def _check_processes(self):
        # killed, but perhaps not gone yet
        end = threading.Event()
        for _ in range(200):
            if not self.processes():
                return
            end.wait(0.05)
        left = self.processes()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self.fail(f'processes left: {left}')

    def one(self, *, final=False, source=None, copy=None, **kw):
        """One pass."""
        theirs, ours = socket.socketpair()
        with contextlib.ExitStack() as stack:
            stack.enter_context(ours)
            with theirs:
                server = sync.serve(
                    source or self.a.upper, theirs, since=self.mark,
                    final=final)
            stack.callback(server.close)
            stats = (copy or self.copy).fetch(
                ours, final=final, timeout=PATIENCE, **kw)
            self.mark = server.mark
        return stats

    @contextlib.contextmanager
    def half_way(self, limit, *, final=False):
        """A pass that has come so far. Yields its server and valve, and a
        function that waits for the end of the fetch and returns its result.
        """
        result = []
        with contextlib.ExitStack() as stack:
            outer, theirs = socket.socketpair()
            inner, ours = socket.socketpair()
            with theirs:
                server = sync.serve(
                    self.a.upper, theirs, since=self.mark, final=final)
            stack.callback(server.close)
            valve = Valve(outer, inner, limit)
            stack.callback(valve.close)

            def fetch():
                try:
                    result.append(self.copy.fetch(
                        ours, final=final, timeout=PATIENCE,
                        idle_timeout=self.idle_timeout))
                except BaseException as e:
                    result.append(e)
                finally:
                    valve.stopped.set()

            thread = threading.Thread(target=fetch, daemon=True)
            thread.start()

            def end():
                thread.join(PATIENCE)
                ours.close()
                return result[0]

            self.assertTrue(valve.stopped.wait(PATIENCE))
            yield server, valve, ours, end

    idle_timeout = 60.0

    def move(self, passes=2):
        """Everything that a migration does with the files."""
        for _ in range(passes):
            self.link_aliases()
            self.one()
        self.link_aliases()
        return self.one(final=True)

    def link_aliases(self):
        if self.a.mounted:
            return sync_links.link_aliases(
                self.layer, self.a.root, self.a.upper)
        return []

    def swap(self):
        """The instance has moved; it may move back."""
        self.a.unmount()
        self.b.unmount()
        self.a, self.b = self.b, self.a
        self.b.clear()
        self.copy = sync.Copy(self.b.upper)
        self.mark = None

    def assert_same(self):
        """The destination has the very same files."""
        self.assert_trees(tree(self.a.upper), tree(self.b.upper))

    def assert_same_view(self):
        """The guest sees the same there as here."""
        before = tree(self.a.root, view=True)
        self.b.mount()
        try:
            self.assert_trees(before, tree(self.b.root, view=True))
        finally:
            self.b.unmount()

    def assert_trees(self, expected, seen):
        self.assertEqual(sorted(expected), sorted(seen))
        for name, value in expected.items():
            self.assertEqual(value, seen[name], name)
