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

"""The OCI runtime: constructor of containers, and nothing more.

It builds namespaces, mounts, capabilities, devices and seccomp from the
bundle. From then on a container is what the kernel says of it.
"""

import functools
import json
import os
import pathlib
import subprocess

from nova_pycontainer.runtime import config as rconfig
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import keeper_client


class OciRuntime:
    """crun, or runc: both have the command line of runc."""

    def __init__(self, config: rconfig.Config) -> None:
        self._path = config.oci_runtime_path
        self._root = config.oci_root
        self._timeout = config.oci_timeout
        self._manager = config.cgroup_manager
        self.name, self.version = self._identify()

    def _identify(self) -> tuple[str, str]:
        try:
            done = subprocess.run(
                [self._path, '--version'], stdin=subprocess.DEVNULL,
                capture_output=True, text=True, timeout=self._timeout)
            words = done.stdout.split()
            return words[0], words[2]
        except (OSError, subprocess.SubprocessError, IndexError) as e:
            raise errors.ContainerError(
                'unsupported',
                f'the OCI runtime {self._path} does not work', cause=str(e),
                remedy='Install crun or runc, or set [pycontainer] '
                       'oci_runtime_path') from e

    @functools.cached_property
    def time_namespaces(self) -> bool:
        """Whether it and the kernel let a container join a time namespace.

        runc says so in ``features`` (1.2 and newer); crun can since 0.17,
        and says nothing of it.
        """
        if not os.path.exists('/proc/self/ns/time_for_children'):
            return False
        if self.name == 'crun':
            return True
        try:
            done = subprocess.run(
                [self._path, 'features'], stdin=subprocess.DEVNULL,
                capture_output=True, text=True, timeout=self._timeout)
            return 'time' in json.loads(done.stdout)['linux']['namespaces']
        except (OSError, subprocess.SubprocessError, ValueError, KeyError,
                TypeError):
            return False

    @property
    def systemd_cgroups(self) -> bool:
        """Whether systemd owns the cgroup tree, so must make the scope."""
        if self._manager == 'auto':
            # sd_booted(3)
            return pathlib.Path('/run/systemd/system').is_dir()
        return self._manager == 'systemd'

    def cgroups_path(self, parent: str, uuid: str) -> str:
        """The bundle's ``linux.cgroupsPath`` for a container."""
        if self.systemd_cgroups:
            return f'{parent}.slice:pycontainer:{uuid}'
        return f'/{parent.strip("/")}/{uuid}'

    def _base(self) -> list[str]:
        argv = [self._path, '--root', str(self._root)]
        if self.systemd_cgroups:
            argv.append('--systemd-cgroup')
        return argv

    def create(
        self, keeper: keeper_client.KeeperClient, uuid: str,
        bundle: pathlib.Path, console_socket: pathlib.Path,
        pid_file: pathlib.Path, cgroup_procs: list[str],
    ) -> int:
        """Create a container whose init waits for :meth:`start`.

        :returns: the init's pid on the host
        :raises ContainerError: ``oci_failed`` with the runtime's own words
        """
        argv = self._base() + [
            'create', '--bundle', str(bundle), '--console-socket',
            str(console_socket), '--pid-file', str(pid_file), uuid]
        done = keeper.run(
            argv, cgroup_procs=cgroup_procs, timeout_s=self._timeout)
        if done['returncode'] != 0:
            raise self._failed(
                uuid, 'create', done['stderr_tail'])
        return int(pid_file.read_text())

    def start(self, uuid: str) -> None:
        self._call(uuid, 'start', uuid)

    def waits(self, uuid: str) -> bool:
        """Whether the init of a created container still waits to be started:
        the start removes what it waits at.
        """
        return (self._root / uuid / 'exec.fifo').exists()

    def delete(self, uuid: str) -> None:
        """Remove what the runtime keeps of a container; idempotent.

        It also kills what is left of it, and removes the v2 cgroup.
        """
        self._call(uuid, 'delete', '--force', uuid)

    def _call(self, uuid: str, verb: str, *arguments: str) -> None:
        try:
            done = subprocess.run(
                [*self._base(), verb, *arguments], stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                timeout=self._timeout)
        except subprocess.TimeoutExpired as e:
            raise errors.ContainerError(
                'timeout',
                f'{self.name} {verb} did not end within '
                f'{self._timeout:.0f} s', uuid=uuid) from e
        if done.returncode:
            raise self._failed(
                uuid, verb, done.stderr.decode(errors='replace'))

    def _failed(
        self, uuid: str, verb: str, text: str
    ) -> errors.ContainerError:
        return errors.ContainerError(
            'oci_failed', f'{self.name} {verb} failed', uuid=uuid,
            cause=text.strip() or 'it gave no reason',
            remedy='If the image is at fault use another one; "pycontainer '
                   'preflight" checks this host')
