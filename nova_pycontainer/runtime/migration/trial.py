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

"""A trial: a real container, dumped and restored on this host.

``criu check`` looks at the kernel's interfaces one by one, and has said "Looks
good" where no process with a TCP socket could be dumped. So the check that
counts makes a container as any other one, of an image that is one program
which listens on a TCP socket, and moves it from this host to this host.
"""

import contextlib
import dataclasses
import os
import pathlib
import platform
import struct
import typing as ty
import uuid as uuidlib

from oslo_log import log as logging

from nova_pycontainer.runtime import config as rconfig
from nova_pycontainer.runtime import container
from nova_pycontainer.runtime import criu
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import dumping
from nova_pycontainer.runtime.migration import guest
from nova_pycontainer.runtime.migration import images
from nova_pycontainer.runtime.migration import restoring
from nova_pycontainer.runtime.migration import terminals
from nova_pycontainer.runtime import process
from nova_pycontainer.runtime import state
from nova_pycontainer.runtime import trees

LOG = logging.getLogger(__name__)

_TIMEOUT = 60.0
_IMAGES = 64 << 20
_MEMORY = 64 << 20

#: socket(AF_INET, SOCK_STREAM, 0); listen(fd, 1); then sleep for ever.
_CODE = {
    'x86_64': (62, bytes.fromhex(
        'b829000000'  # mov eax, 41 (socket)
        'bf02000000'  # mov edi, 2
        'be01000000'  # mov esi, 1
        '31d2'        # xor edx, edx
        '0f05'        # syscall
        '89c7'        # mov edi, eax
        'be01000000'  # mov esi, 1
        'b832000000'  # mov eax, 50 (listen)
        '0f05'        # syscall
        'b822000000'  # mov eax, 34 (pause)
        '0f05'        # syscall
        'ebf7')),     # jmp to the pause
    'aarch64': (183, struct.pack('<16I', *(
        0x52800040,  # mov w0, 2
        0x52800021,  # mov w1, 1
        0x52800002,  # mov w2, 0
        0x528018C8,  # mov w8, 198 (socket)
        0xD4000001,  # svc 0
        0x52800021,  # mov w1, 1
        0x52801928,  # mov w8, 201 (listen)
        0xD4000001,  # svc 0
        0xD2800000,  # mov x0, 0
        0xD2800001,  # mov x1, 0
        0xD2800002,  # mov x2, 0
        0xD2800003,  # mov x3, 0
        0xD2800004,  # mov x4, 0
        0x52800928,  # mov w8, 73 (ppoll)
        0xD4000001,  # svc 0
        0x17FFFFF9,  # b to the first of its arguments
    ))),
}
_DIRECTORIES = ('dev', 'etc', 'proc', 'run', 'sys', 'tmp', 'var', 'root')
_BASE = 0x400000

Maker = ty.Callable[[state.State], container.Container]


def program() -> bytes:
    """A static ELF executable.

    :raises ContainerError: ``unsupported``: an architecture without one
    """
    try:
        machine, code = _CODE[platform.machine()]
    except KeyError:
        raise errors.ContainerError(
            'unsupported', 'there is no trial program for '
            f'{platform.machine()}') from None
    size = 64 + 56 + len(code)
    header = struct.pack(
        '<16sHHIQQQIHHHHHH', b'\x7fELF\x02\x01\x01', 2, machine, 1,
        _BASE + 120, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack(
        '<IIQQQQQQ', 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return header + segment + code


def make_layer(root: pathlib.Path) -> None:
    """An image with nothing but the program."""
    root.mkdir(mode=0o755, parents=True)
    for name in _DIRECTORIES:
        (root / name).mkdir(mode=0o755)
    (root / 'init').write_bytes(program())
    (root / 'init').chmod(0o755)


def within(config: rconfig.Config) -> rconfig.Config:
    """A host's configuration, with directories apart from its instances.

    On the same file systems: these are part of what is tried.
    """
    return dataclasses.replace(
        config, state_dir=config.state_dir / 'trial',
        run_dir=config.run_dir / 'trial')


class Trial:
    """One trial.

    :param config: with directories of the trial's own, see :func:`within`
    :param make: makes a container of that configuration
    """

    def __init__(
        self, config: rconfig.Config, tool: criu.Criu, make: Maker,
        base_id: int, logs: pathlib.Path,
    ) -> None:
        self._top = config.state_dir
        self._run = config.run_dir
        self._images = config.run_dir / 'migration' / 'images'
        self._criu = tool
        self._make = make
        self._base_id = base_id
        self._logs = logs

    def run(self) -> None:
        """:raises ContainerError: what failed, and why"""
        self.clean()
        uuid = str(uuidlib.uuid4())
        item = self._container(uuid)
        memory = images.Memory(self._images)
        with contextlib.ExitStack() as stack:
            stack.callback(self.clean)
            layer = self._top / 'layer'
            self._run.mkdir(mode=0o755)
            self._top.mkdir(mode=0o711)
            make_layer(layer)
            item.directory.mkdir(mode=0o700, parents=True)
            item.disk.create()
            stack.callback(memory.unmount)
            memory.mount(_IMAGES)
            stack.callback(item.teardown)
            item.prepare(layer)
            item.start()
            assert item.st.run is not None
            self._move(item, memory, int(item.st.run['process']['pid']))

    def _container(self, uuid: str) -> container.Container:
        return self._make(state.State(
            uuid=uuid, base_id=self._base_id, disk_method='none',
            created_at=0.0, spec={
                'name': 'trial', 'hostname': 'trial', 'image_id': 'trial',
                'layer': 'sha256-' + '0' * 64, 'nics': [],
                'resources': {'memory_bytes': _MEMORY, 'vcpus': 1,
                              'pids_max': 16, 'disk_bytes': None}}))

    def _move(
        self, item: container.Container, memory: images.Memory, pid: int
    ) -> None:
        external = guest.external_mounts(pid, item.nodes)
        cgroups = guest.save_cgroups(item.cgroup)
        with self._criu.session() as session:
            options = dumping.options(
                self._criu, item, memory.path, external, pid)
            response = session.request(
                self._criu.rpc.DUMP, options, lambda script: None, _TIMEOUT)
            if not response.success:
                raise self._failed('dumped', memory.path / 'criu.log',
                                   response)
        fd = item.open()
        if fd is not None:
            gone = process.exited(fd, _TIMEOUT)
            os.close(fd)
            if not gone:
                raise errors.ContainerError(
                    'criu_failed', 'the trial container did not end')
        item.cgroup.create_v2(item.spec.limits)
        guest.make_cgroups(item.cgroup, cgroups, item.st.base_id)
        # It has no login either.
        terminals.mend(memory.path, self._criu.messages(), {})
        restored: list[int] = []

        def notified(script: criu.Script) -> None:
            if script.fd is not None:
                # Of its console, which is gone as soon as this is closed.
                stack.callback(os.close, script.fd)
            if script.name == 'setup-namespaces' and script.pid:
                restored.append(script.pid)

        procs = item.cgroup.create_legacy(item.spec.limits)
        with contextlib.ExitStack() as stack:
            session = stack.enter_context(
                self._criu.session(cgroup_procs=procs))
            options = restoring.options(
                self._criu, item, memory.path, {'external': external})
            response = session.request(
                self._criu.rpc.RESTORE, options, notified, _TIMEOUT)
            if not response.success:
                raise self._failed('restored', memory.path / 'restore.log',
                                   response)
            assert item.st.run is not None
            item.st.run['process'] = process.ProcessId.of(
                restored[0]).to_dict()
            fd = item.open()
            if fd is None or process.exited(fd, 0.1):
                raise errors.ContainerError(
                    'criu_failed', 'the restored trial container has ended')
            os.close(fd)
            item.kill()

    def _failed(
        self, what: str, log: pathlib.Path, response: object
    ) -> errors.ContainerError:
        return criu.failed(
            f'the trial container cannot be {what}', 'trial', what, log,
            self._logs, response,
            'Upgrade criu and the kernel')

    def clean(self) -> None:
        """Remove what a trial has left that was cut off; idempotent."""
        instances = self._top / 'instances'
        if instances.is_dir():
            for directory in instances.iterdir():
                item = self._container(directory.name)
                item.cgroup.kill()
                item.teardown()
        images.Memory(self._images).unmount()
        for path in (self._top, self._run):
            if path.exists():
                trees.remove(path)
