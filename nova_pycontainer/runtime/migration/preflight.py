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

"""Can this host run containers, and live-migrate them? Each check by name,
with what is wrong and what helps.
"""

import collections.abc as cabc
import contextlib
import dataclasses
import datetime
import os
import pathlib
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import time
import typing as ty

from cryptography import x509
from oslo_log import log as logging

from nova_pycontainer.runtime import cgroup
from nova_pycontainer.runtime import config as rconfig
from nova_pycontainer.runtime import container
from nova_pycontainer.runtime import cpuset
from nova_pycontainer.runtime import criu
from nova_pycontainer.runtime import disk
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import keeper_client
from nova_pycontainer.runtime import lxcfs
from nova_pycontainer.runtime.migration import identity
from nova_pycontainer.runtime.migration import trial
from nova_pycontainer.runtime import network
from nova_pycontainer.runtime import oci
from nova_pycontainer.runtime import overlay
from nova_pycontainer.runtime import process
from nova_pycontainer.runtime import state

LOG = logging.getLogger(__name__)

#: rsync reads no byte twice and keeps nanoseconds since then.
_RSYNC = (3, 2)
_MIN_LIFE = datetime.timedelta(days=30)
_CGROUP = pathlib.Path('/sys/fs/cgroup')
_INOTIFY = pathlib.Path('/proc/sys/fs/inotify/max_user_instances')
#: Measured with Debian 13: a guest that nobody is logged in to.
_INOTIFY_EACH = 8
_INOTIFY_MIN = 1024


class Level:
    """What a host without it cannot do."""

    RUN = 'run'
    MIGRATE = 'migrate'
    #: It can do without: slower, or not as safe.
    OPTIONAL = 'optional'


@dataclasses.dataclass
class Check:
    name: str
    level: str
    #: What is checked, for people.
    title: str
    ok: bool = False
    reason: str | None = None
    remedy: str | None = None

    def to_dict(self) -> dict[str, ty.Any]:
        return dataclasses.asdict(self)


class Failed(Exception):
    """A check's own finding."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


class Preflight:
    """The checks of one host, and their last result.

    :param base_id: first id of a range that no container has
    """

    def __init__(
        self, config: rconfig.Config, tool: criu.Criu,
        keeper: keeper_client.KeeperClient, hierarchies: cgroup.Hierarchies,
        base_id: int,
    ) -> None:
        self._config = config
        self._criu = tool
        self._keeper = keeper
        self._hierarchies = hierarchies
        self._base_id = base_id
        self._running = threading.Lock()
        self._result: dict[str, ty.Any] | None = None
        self._file = config.state_dir / 'preflight.json'

    def result(self) -> dict[str, ty.Any] | None:
        """The last result that is valid still: of this kernel and this CRIU.
        """
        if self._result is None:
            with contextlib.suppress(
                    OSError, ValueError, errors.ContainerError):
                kept = state.read_json(self._file)
                if kept.get('of') == self._of():
                    self._result = kept
        return self._result

    def _of(self) -> list[ty.Any]:
        """What a result is of, so that it is no longer of anything else."""
        # Another release may check other things.
        found: list[ty.Any] = [
            process.boot_id(), platform.release(), state.FORMAT]
        for path in self._config.criu_path, self._config.oci_runtime_path:
            real = os.path.realpath(shutil.which(path) or path)
            try:
                status = os.stat(real)
                found.append([real, status.st_mtime_ns, status.st_size])
            except OSError:
                found.append([real, None, None])
        return found

    def start(self) -> None:
        """Check in the background, unless there is a valid result."""
        if self.result() is None:
            threading.Thread(
                target=self._in_background, name='preflight',
                daemon=True).start()

    def _in_background(self) -> None:
        try:
            result = self.run()
        except Exception:
            LOG.exception('the preflight checks failed')
            return
        for check in result['checks']:
            if not check['ok'] and check['level'] != Level.OPTIONAL:
                LOG.warning('preflight: %s: %s. %s', check['title'],
                            check['reason'], check['remedy'])

    def run(self) -> dict[str, ty.Any]:
        """Check now. Takes some seconds."""
        with self._running:
            began = time.monotonic()
            checks = [self._check(name, level, title, function)
                      for name, level, title, function in self._list()]
            failed = {c.level for c in checks if not c.ok}
            good = {c.name for c in checks if c.ok}
            can_migrate = not failed & {Level.RUN, Level.MIGRATE}
            self._result = {
                'format': state.FORMAT,
                'of': self._of(),
                'at': time.time(),
                'seconds': round(time.monotonic() - began, 3),
                'can_run': Level.RUN not in failed,
                'can_migrate': can_migrate,
                'features': {
                    'live_migration': can_migrate,
                    'post_copy': can_migrate and 'lazy_pages' in good,
                    'pre_copy': can_migrate and 'mem_dirty_track' in good},
                'checks': [c.to_dict() for c in checks],
            }
            state.write_json(self._file, self._result)
            return self._result

    @staticmethod
    def _check(
        name: str, level: str, title: str,
        function: cabc.Callable[[], str | None],
    ) -> Check:
        check = Check(name, level, title)
        try:
            check.reason = function()
            check.ok = True
        except Failed as e:
            check.reason, check.remedy = e.reason, e.remedy
        except errors.ContainerError as e:
            check.reason = e.message + (f': {e.cause}' if e.cause else '')
            check.remedy = e.remedy
        except (OSError, subprocess.SubprocessError) as e:
            check.reason = str(e)
        return check

    def _list(self) -> cabc.Iterator[
            tuple[str, str, str, cabc.Callable[[], str | None]]]:
        yield ('oci_runtime', Level.RUN, 'OCI runtime', self._oci_runtime)
        yield ('cgroup_v2', Level.RUN, 'cgroup v2, with freezer and kill',
               self._cgroup_v2)
        yield ('cgroup_controllers', Level.OPTIONAL,
               'limits for CPU, memory and processes', self._controllers)
        yield ('overlay', Level.RUN, 'overlay with index and nfs_export on '
               'an idmapped layer', self._overlay)
        yield ('disk_limit', Level.OPTIONAL, 'limit for a root disk\'s size',
               self._disk_limit)
        yield ('interface_limits', Level.OPTIONAL,
               'limits for the bandwidth of interfaces', network.check_limits)
        yield ('inotify', Level.OPTIONAL, 'inotify instances for many guests',
               self._inotify)
        yield ('lxcfs', Level.OPTIONAL, 'guests see their own memory and CPUs',
               self._lxcfs)
        yield ('rsync', Level.MIGRATE, 'rsync', self._rsync)
        yield ('keys', Level.MIGRATE, 'key and certificate of this host',
               self._keys)
        yield ('criu', Level.MIGRATE, 'CRIU', self._criu_version)
        yield ('pycriu', Level.MIGRATE, 'Python package pycriu',
               self._pycriu)
        yield ('network_lock', Level.MIGRATE, 'network lock by nftables',
               self._feature('network_lock_nftables', 'Use a kernel with '
                             'CONFIG_NF_TABLES_INET and a CRIU built with '
                             'nftables'))
        yield ('time_namespace', Level.MIGRATE, 'time namespaces',
               self._feature('timens', 'Use a kernel with CONFIG_TIME_NS'))
        yield ('trial', Level.MIGRATE, 'a container dumped and restored',
               self._trial)
        yield ('lazy_pages', Level.OPTIONAL, 'post-copy migration',
               self._lazy_pages)
        yield ('mem_dirty_track', Level.OPTIONAL, 'pre-copy migration',
               self._feature('mem_dirty_track', 'Use a kernel with '
                             'CONFIG_MEM_SOFT_DIRTY, as distributions have '
                             'it'))

    # To run containers

    def _oci_runtime(self) -> str:
        runtime = oci.OciRuntime(self._config)
        return f'{runtime.name} {runtime.version}'

    def _cgroup_v2(self) -> str:
        if not (_CGROUP / 'cgroup.controllers').exists():
            raise Failed(
                f'no cgroup v2 is mounted at {_CGROUP}',
                'Boot with systemd.unified_cgroup_hierarchy=1')
        group = _CGROUP / f'pycontainer-preflight-{os.getpid()}'
        group.mkdir()
        try:
            lacking = [name for name in ('cgroup.freeze', 'cgroup.kill')
                       if not (group / name).exists()]
        finally:
            group.rmdir()
        if lacking:
            raise Failed(f'this kernel has no {" and no ".join(lacking)}',
                         'Use Linux 5.14 or newer')
        return self._hierarchies.mode

    def _controllers(self) -> None:
        missing = self._hierarchies.missing()
        if missing:
            raise Failed(
                f'no hierarchy has {", ".join(missing)}: such limits are '
                'not enforced', 'Enable them in the kernel\'s command line')

    def _overlay(self) -> str:
        status = os.statvfs(self._config.state_dir)
        top = pathlib.Path(tempfile.mkdtemp(
            prefix='preflight-', dir=self._config.state_dir))
        root = pathlib.Path(tempfile.mkdtemp(
            prefix='preflight-', dir=self._config.run_dir))
        try:
            for name in ('layer', 'upper', 'work'):
                (top / name).mkdir()
            try:
                overlay.mount(
                    root / 'root', layer=top / 'layer', upper=top / 'upper',
                    work=top / 'work', base_id=self._base_id)
            except OSError as e:
                raise Failed(
                    f'{self._config.state_dir}: {e}',
                    'Use ext4, xfs or btrfs for the state directory and '
                    'Linux 5.15 or newer (6.6 for an upper on tmpfs)') from e
            overlay.unmount(root / 'root')
        finally:
            shutil.rmtree(top, ignore_errors=True)
            shutil.rmtree(root, ignore_errors=True)
        free = status.f_bavail * status.f_frsize >> 30
        return f'{free} GiB free in {self._config.state_dir}'

    def _disk_limit(self) -> str:
        method = disk.choose_method(
            self._config.disk_limit, self._config.state_dir)
        if method == 'none':
            raise Failed(
                'a guest may fill the disk of this host',
                'Mount the file system of the state directory with '
                'prjquota, or set [pycontainer]disk_limit=auto')
        return method

    def _inotify(self) -> str:
        # What a container uses is charged to its user namespace's owner, too:
        # to root, for all of them. Beyond it systemd does not start ("Failed
        # to allocate manager object: Too many open files").
        limit = int(_INOTIFY.read_text())
        guests = limit // _INOTIFY_EACH
        if limit < _INOTIFY_MIN:
            raise Failed(
                f'{limit} for all of this host: {guests} guests with systemd',
                'Set the sysctl fs.inotify.max_user_instances to 65536, as '
                'etc/sysctl.d/60-pycontainer.conf does')
        return f'{limit}: {guests} guests with systemd'

    def _lxcfs(self) -> str:
        shares = lxcfs.Lxcfs(self._config.lxcfs_dir)
        if shares.directory is None:
            return 'not used ([pycontainer]lxcfs_dir = none)'
        if not shares.files():
            raise Failed(f'no lxcfs is mounted at {shares.directory}, or it '
                         'does not answer', shares.remedy())
        return str(shares.directory)

    # To migrate them

    def _rsync(self) -> str:
        done = subprocess.run(
            ['rsync', '--version'], stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=30)
        found = re.search(r'version (\d+)\.(\d+)\S*', done.stdout)
        if found is None or (int(found[1]), int(found[2])) < _RSYNC:
            raise Failed(
                found[0] if found else 'it does not tell its version',
                f'Install rsync {".".join(map(str, _RSYNC))} or newer')
        return found[0].removeprefix('version ')

    def _keys(self) -> str:
        found = identity.load(self._config)
        certificate = x509.load_pem_x509_certificate(
            found.certificate.encode())
        now = datetime.datetime.now(datetime.UTC)
        end = certificate.not_valid_after_utc
        if certificate.not_valid_before_utc > now or end < now + _MIN_LIFE:
            raise Failed(
                'the certificate is valid from '
                f'{certificate.not_valid_before_utc:%Y-%m-%d} to '
                f'{end:%Y-%m-%d}', 'Renew it, and look at the clock')
        reason = identity.unnamed(self._config, found)
        if reason is not None:
            raise Failed(reason, 'Have the CA issue one with the host\'s '
                         'name, or with [pycontainer]migration_address')
        return found.fingerprint()

    def _criu_version(self) -> str:
        version = self._criu.version()
        text = '.'.join(map(str, version))
        if version < criu.MIN_VERSION:
            raise Failed(
                f'CRIU {text} cannot dump what every guest has on current '
                'kernels', 'Install CRIU '
                f'{".".join(map(str, criu.MIN_VERSION))} or newer, or set '
                '[pycontainer]criu_path')
        return text

    def _pycriu(self) -> None:
        rpc, messages = self._criu.rpc, self._criu.messages()
        for module, name in ((rpc, 'criu_opts'), (messages, 'core_entry')):
            if not hasattr(module, name):
                raise Failed(f'it has no {name}', 'Install python3-pycriu '
                             'of the same version as criu')

    def _feature(
        self, name: str, remedy: str
    ) -> cabc.Callable[[], None]:
        def check() -> None:
            reason = self._criu.check(name)
            if reason is not None:
                raise Failed(reason.splitlines()[-1][:300], remedy)
        return check

    def _lazy_pages(self) -> None:
        self._feature('uffd-noncoop', 'Use a kernel with '
                      'CONFIG_USERFAULTFD')()
        allowed = pathlib.Path('/proc/sys/vm/unprivileged_userfaultfd')
        if allowed.exists() and allowed.read_text().strip() == '0':
            raise Failed(
                'only root may use userfaultfd, and a guest is restored in '
                'a user namespace of its own',
                'Set the sysctl vm.unprivileged_userfaultfd=1')

    def _trial(self) -> None:
        config = trial.within(self._config)
        runtime = oci.OciRuntime(config)
        trial.Trial(
            config, self._criu,
            lambda st: container.Container(
                config, runtime, self._hierarchies, self._keeper,
                cpuset.Pool(lambda: None), st),
            self._base_id, self._config.state_dir / 'logs').run()
