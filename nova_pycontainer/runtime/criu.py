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

"""CRIU, driven over its RPC (``criu swrk``).

https://criu.org/RPC. One :class:`Session` is one ``criu swrk`` process, that
serves one request and asks back through notifications while it works. The
process is a child of the keeper: a restored init becomes the keeper's child
in the same way as a created one does, and no death of the agent takes CRIU
with it in the middle of a migration.
"""

import collections.abc as cabc
import contextlib
import dataclasses
import importlib
import importlib.util
import os
import pathlib
import re
import select
import shutil
import socket
import subprocess
import sys
import time
import types
import typing as ty

from oslo_log import log as logging

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import keeper_client
from nova_pycontainer.runtime import process
from nova_pycontainer.runtime import procfs

LOG = logging.getLogger(__name__)

#: Older ones fail on current kernels with what every guest has: the vDSO's
#: bounds (6.13), SO_PASSSEC on TCP sockets (6.16).
MIN_VERSION = (4, 2)

_MAX_MESSAGE = 1 << 20
_END_TIMEOUT = 20.0
#: Seconds for CRIU after the end of its helper.
_ALONE: ty.Final = 3.0
_PACKAGES = '/usr/lib/python3/dist-packages'


class Script(ty.NamedTuple):
    """A notification: CRIU waits until its handler returns.

    :param pid: the init's pid on the host, at ``setup-namespaces`` and
        ``post-restore``
    :param fd: a descriptor that came with it (``orphan-pts-master``), which
        now is the handler's
    """

    name: str
    pid: int | None
    fd: int | None


Handler = ty.Callable[[Script], None]


class Helper(ty.Protocol):
    """A process that CRIU depends on."""

    def fileno(self) -> int:
        """Readable when it has ended."""

    def failed(self) -> bool: ...


@dataclasses.dataclass(frozen=True)
class Options:
    """What dump and restore have in common, and what is of one of them.

    :param images: directory of the images; CRIU's log goes there too
    :param root: root directory of the container's mount namespace
    :param external: CRIU's ``--external``
    """

    images: pathlib.Path
    root: pathlib.Path
    external: tuple[str, ...] = ()
    cgroup: str = '/'
    log: str = 'criu.log'
    log_level: int = 2
    lazy_pages: bool = False
    page_server_fd: int | None = None
    parent_images: str | None = None
    track_memory: bool = False
    leave_stopped: bool = False
    timeout: int = 300
    config_file: pathlib.Path | None = None
    freeze_cgroup: pathlib.Path | None = None


def _pycriu(name: str, criu_path: str) -> types.ModuleType:
    """Import a module of pycriu, which comes with CRIU itself.

    It is looked for in our own path, then where distributions put it beside
    the binary. Its directory is not added to the path: there lie packages of
    the distribution for another Python environment than ours.
    """
    with contextlib.suppress(ImportError):
        return importlib.import_module(f'pycriu.{name}')
    binary = pathlib.Path(criu_path).resolve()
    for base in (pathlib.Path(_PACKAGES),
                 binary.parents[1] / 'lib/python3/dist-packages'):
        directory = base / 'pycriu'
        spec = importlib.util.spec_from_file_location(
            'pycriu', directory / '__init__.py',
            submodule_search_locations=[str(directory)])
        if not (directory / '__init__.py').exists() or spec is None:
            continue
        module = importlib.util.module_from_spec(spec)
        sys.modules['pycriu'] = module
        try:
            assert spec.loader
            spec.loader.exec_module(module)
            return importlib.import_module(f'pycriu.{name}')
        except ImportError as e:
            del sys.modules['pycriu']
            raise errors.ContainerError(
                'unsupported', f'{directory} cannot be imported',
                cause=str(e)) from e
    raise errors.ContainerError(
        'unsupported', 'the Python package pycriu is not installed',
        remedy='Install python3-pycriu of the same version as criu')


class Criu:
    """One installation of CRIU."""

    def __init__(
        self, path: str, keeper: keeper_client.KeeperClient
    ) -> None:
        self._path = path
        self._keeper = keeper
        self._module: types.ModuleType | None = None

    @property
    def rpc(self) -> types.ModuleType:
        if self._module is None:
            self._module = _pycriu('rpc_pb2', self._path)
        return self._module

    def messages(self) -> types.ModuleType:
        """The protobuf messages of which the images consist."""
        return _pycriu('images.pb', self._path)

    def version(self) -> tuple[int, ...]:
        """:raises ContainerError: ``unsupported``: it does not run"""
        try:
            done = subprocess.run(
                [self._path, '--version'], stdin=subprocess.DEVNULL,
                capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.SubprocessError) as e:
            raise errors.ContainerError(
                'unsupported', f'{self._path} does not work', cause=str(e),
                remedy='Install criu, or set [pycontainer] criu_path') from e
        found = re.search(r'Version: ([0-9.]+)', done.stdout)
        if not found:
            raise errors.ContainerError(
                'unsupported', f'{self._path} does not tell its version',
                cause=(done.stderr or done.stdout)[:300])
        return tuple(int(n) for n in found[1].split('.'))

    def check(self, feature: str | None = None) -> str | None:
        """``criu check``: None, or why the kernel lacks the feature."""
        argv = [self._path, 'check']
        if feature:
            argv += ['--feature', feature]
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=60)
        if done.returncode == 0:
            return None
        return (done.stderr + done.stdout).strip() or 'it gave no reason'

    def spawn(
        self, arguments: cabc.Sequence[str], fds: cabc.Mapping[int, int],
        guard: cabc.Sequence[str] = (),
    ) -> int:
        """Start ``criu`` as a long-lived child of the keeper.

        :param guard: a command that runs it, given as its last arguments
        """
        return self.run([*guard, self._path, *arguments], fds)

    def run(
        self, argv: cabc.Sequence[str], fds: cabc.Mapping[int, int]
    ) -> int:
        """Start another long-lived child of the keeper."""
        return self._keeper.spawn(
            argv, fds=fds, env={'PATH': '/usr/bin:/bin', 'LC_ALL': 'C'})

    def session(
        self, cgroup_procs: cabc.Sequence[pathlib.Path] = (),
        fds: cabc.Mapping[int, int] | None = None,
    ) -> 'Session':
        """Start ``criu swrk``.

        :param cgroup_procs: cgroups that a restored container is to be
            charged to: what CRIU restores is forked by it
        :param fds: descriptors for CRIU, by their number there; from 10 up
        """
        # Before there is a process: it may not be installed.
        rpc = self.rpc
        ours, theirs = socket.socketpair(
            socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            pid = self._keeper.spawn(
                [self._path, 'swrk', '3'], fds={
                    3: theirs.fileno(), **(fds or {})},
                # Without /sbin CRIU finds no iptables: the legacy tables
                # are not used in a guest, and looking costs two processes a
                # namespace.
                env={'PATH': '/usr/bin:/bin', 'LC_ALL': 'C'},
                cgroup_procs=[str(p) for p in cgroup_procs])
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        return Session(rpc, ours, pid)

    def options(self, o: Options) -> ty.Any:
        """The ``criu_opts`` of a request."""
        opts = self.rpc.criu_opts(
            images_dir_fd=-1,
            images_dir=str(o.images),
            log_file=o.log,
            log_level=o.log_level,
            root=str(o.root),
            notify_scripts=True,
            # What a system container has of these is its own business.
            tcp_established=True,
            ext_unix_sk=True,
            file_locks=True,
            link_remap=True,
            evasive_devices=True,
            orphan_pts_master=True,
            ghost_limit=64 << 20,
            enable_fs=['ramfs'],
            external=list(o.external),
            # Nothing but the paths: which cgroups there are, whose they are
            # and what their limits are is restored by us, before CRIU.
            manage_cgroups=True,
            manage_cgroups_mode=self.rpc.SOFT,
            cgroup_dump_controller=[''],
            # Needs no program in PATH, other than iptables.
            network_lock=self.rpc.NFTABLES,
            timeout=o.timeout,
            lazy_pages=o.lazy_pages,
            leave_stopped=o.leave_stopped,
        )
        opts.cg_root.add(ctrl='', path=o.cgroup)
        if o.parent_images:
            opts.parent_img = o.parent_images
        if o.track_memory:
            opts.track_mem = True
        if o.page_server_fd is not None:
            opts.ps.fd = o.page_server_fd
        if o.config_file:
            opts.config_file = str(o.config_file)
        if o.freeze_cgroup:
            opts.freeze_cgroup = str(o.freeze_cgroup)
        return opts


class Session:
    """One ``criu swrk`` process and the conversation with it."""

    def __init__(
        self, rpc: types.ModuleType, sock: socket.socket, pid: int
    ) -> None:
        self._rpc = rpc
        self._sock = sock
        self.pid = pid
        #: Seconds that CRIU itself has worked, without our handlers' time.
        self.worked = 0.0
        # What it restores has its end of the socket too, so that its death
        # is not the end of the connection.
        try:
            self._pidfd = process.pidfd_open(pid)
        except ProcessLookupError:
            sock.close()
            raise errors.ContainerError(
                'criu_failed', 'criu ended at once') from None
        self._timeout = 0.0
        self._helper: Helper | None = None
        self._alone = self._failed = False

    def __enter__(self) -> 'Session':
        return self

    def __exit__(self, *exc: object) -> None:
        # At the end of the connection CRIU gives up what it does, and a
        # dump's processes go on.
        self._sock.close()
        if self._pidfd >= 0:
            if (self._failed or any(exc)) and process.exited(
                    self._pidfd, _END_TIMEOUT):
                process.kill_session(self.pid, 'criu')
            os.close(self._pidfd)
            self._pidfd = -1

    def wait(self) -> None:
        """Hang up, and wait until CRIU is gone: it has files open."""
        self._sock.close()
        if self._pidfd >= 0 and not process.exited(
                self._pidfd, _END_TIMEOUT):
            LOG.warning('criu (%d) does not end', self.pid)

    def fileno(self) -> int:
        return self._sock.fileno()

    def kill(self) -> None:
        """Kill CRIU, where it does not heed a refusal.

        Killed processes that it traces stay zombies until it is gone, and so
        does the init of their PID namespace, which it would wait for.
        """
        if self._pidfd >= 0:
            process.send_signal(self._pidfd, 9)

    def request(
        self, kind: int, opts: ty.Any, handler: Handler, timeout: float,
        helper: Helper | None = None,
    ) -> ty.Any:
        """Send a request, serve notifications, and return the response.

        An error that the handler raises refuses the notification; CRIU then
        takes back what it did, and the error is raised here.

        :param timeout: seconds between two messages of CRIU
        :param helper: without whose success CRIU has none, either; it is
            killed if it does not notice
        :raises ContainerError: ``criu_failed``
        """
        try:
            return self._request(kind, opts, handler, timeout, helper)
        except BaseException:
            self._failed = True
            raise

    def _request(
        self, kind: int, opts: ty.Any, handler: Handler, timeout: float,
        helper: Helper | None,
    ) -> ty.Any:
        self._sock.settimeout(timeout)
        self._timeout = timeout
        self._helper = helper
        message = self._rpc.criu_req(type=kind, opts=opts)
        try:
            self._sock.sendall(message.SerializeToString())
        except OSError as e:
            raise errors.ContainerError(
                'criu_failed', 'criu is gone', cause=str(e)) from e
        refused: BaseException | None = None
        while True:
            began = time.monotonic()
            try:
                response, fd = self._receive()
            except errors.ContainerError:
                if refused is not None:
                    raise refused from None
                raise
            finally:
                self.worked += time.monotonic() - began
            if response.type != self._rpc.NOTIFY:
                break
            answer = self._rpc.criu_req(
                type=self._rpc.NOTIFY, notify_success=True)
            script = Script(
                response.notify.script,
                response.notify.pid or None, fd)
            try:
                handler(script)
            except BaseException as e:
                refused = refused or e
                answer.notify_success = False
            try:
                self._sock.sendall(answer.SerializeToString())
            except OSError as e:
                raise refused or errors.ContainerError(
                    'criu_failed', 'criu is gone', cause=str(e)) from e
        if refused is not None:
            raise refused
        return response

    def _wait(self) -> dict[int, int]:
        """What can be read, of CRIU's socket and its end."""
        poller = select.poll()
        poller.register(self._sock, select.POLLIN)
        poller.register(self._pidfd, select.POLLIN)
        helper = self._helper
        if helper is not None:
            poller.register(helper, select.POLLIN)
        ready = dict(poller.poll(self._timeout * 1000))
        if helper is not None and set(ready) == {helper.fileno()}:
            self._helper = None
            poller.unregister(helper)
            self._alone = helper.failed()
            if self._alone:
                # Also for all that CRIU may still say.
                self._timeout = _ALONE
            ready = dict(poller.poll(self._timeout * 1000))
        if self._alone and not ready:
            # It waits for the guest's init, which waits for processes that
            # only their tracer can reap, and that is CRIU.
            self.kill()
        return ready

    def _receive(self) -> tuple[ty.Any, int | None]:
        ready = self._wait()
        if not ready:
            raise errors.ContainerError('timeout', 'criu does not answer')
        if self._sock.fileno() not in ready:
            raise errors.ContainerError('criu_failed', 'criu was killed')
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, _MAX_MESSAGE, 1)
        except OSError as e:
            raise errors.ContainerError(
                'criu_failed', 'criu is gone', cause=str(e)) from e
        if not data:
            raise errors.ContainerError(
                'criu_failed', 'criu ended without an answer')
        response = self._rpc.criu_resp()
        response.ParseFromString(data)
        return response, fds[0] if fds else None


#: The first of these in CRIU's log is the cause; what follows are results.
_ERROR = re.compile(r'^(?:\([ 0-9.]+\))?\s*(?:\d+:\s*)?Error \([^)]*\): '
                    r'(?P<text>.*)$')


#: Said of things that CRIU then does without.
_HARMLESS = re.compile(
    r"RLIMIT_NOFILE for self|tables-(legacy-)?(restore|save) -V failed|"
    r"execvp\(|Address already assigned|address already assigned")


def reason(log: pathlib.Path) -> str | None:
    """The first real error in a log of CRIU's, with the process's name.

    What it cannot dump or restore is named by a pid there.
    """
    try:
        with open(log, errors='replace') as f:
            for line in f:
                match = _ERROR.match(line)
                if match and not _HARMLESS.search(line):
                    return _name_pids(match['text'].strip())
    except FileNotFoundError:
        pass
    return None


def failed(
    message: str, uuid: str, step: str, log: pathlib.Path,
    keep: pathlib.Path, response: ty.Any, remedy: str,
) -> errors.ContainerError:
    """The error of a refused request; the log is kept where it can be read.

    :param keep: directory for the log, of which the last one of each instance
        and step stays
    """
    cause = reason(log) or str(response.cr_errmsg).strip()
    kept = keep / f'{uuid}-{step}.log'
    try:
        keep.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copyfile(log, kept)
        kept.chmod(0o600)
        remedy = f'{remedy}. CRIU\'s log is {kept}'
    except OSError as e:
        LOG.warning('the log of criu cannot be kept: %s', e)
    return errors.ContainerError(
        'criu_failed', message, uuid=uuid, step=step, cause=cause,
        remedy=remedy)


def _name_pids(text: str) -> str:
    def name(match: re.Match[str]) -> str:
        try:
            comm = procfs.text(f'/proc/{match[1]}/comm').strip()
        except OSError:
            return match[0]
        return f'{match[0]} ({comm})'

    return re.sub(r'\b(?:pid|task|of) (\d+)\b', name, text)
