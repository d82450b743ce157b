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

"""Create, start and delete a container, beside the bare OCI runtime.

    python -m tests.benchmarks.lifecycle [--runs N] [--image NAME]

Both sides start the same image with the same bundle: the bare side runs
"crun create", "crun start" and "crun delete --force" on a bundle that the
runtime package wrote, with a root file system that is there already and
without network. What the runtime package does on top of it is then plain:
the id range, the disk limit, the overlay, the network port, the console with
its log, the exit status, the record on disk.
"""

import copy
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import typing as ty
import uuid as uuidlib

from nova_pycontainer.runtime import overlay
from tests.benchmarks import common


def ours(bench: common.Bench, image: str) -> dict[str, float]:
    """Seconds of each verb, once."""
    spec = bench.spec(image)
    uuid = str(uuidlib.uuid4())
    host = bench.host
    verbs: list[tuple[str, ty.Callable[[], ty.Any]]] = [
        ('plug', lambda: host.plug(uuid, spec['nics'])),
        ('define', lambda: host.define(uuid, spec)),
        ('prepare', lambda: host.prepare(uuid)),
        ('start', lambda: host.start_container(uuid)),
        ('delete', lambda: host.delete(uuid)),
    ]
    seconds = {}
    for name, verb in verbs:
        begin = time.perf_counter()
        verb()
        seconds[name] = time.perf_counter() - begin
    return seconds


class Bare:
    """The OCI runtime by itself, on a bundle of the runtime package."""

    def __init__(self, bench: common.Bench, image: str) -> None:
        self._config = bench.config
        self._top = pathlib.Path(tempfile.mkdtemp(
            prefix='bare-', dir=bench.config.state_dir))
        # The container's root has to get through to its files.
        self._top.chmod(0o711)
        self._root = pathlib.Path(tempfile.mkdtemp(dir='/run'))
        # A container of ours, only to take its bundle over.
        uuid = str(uuidlib.uuid4())
        bench.host.define(uuid, bench.spec(image))
        info = bench.host.prepare(uuid)
        base = info['base_id']
        source = bench.config.run_dir / 'bundle' / uuid / 'config.json'
        self._document = json.loads(source.read_text())
        bench.host.delete(uuid)
        self._mount = self._top / 'root'
        self._upper, self._work = self._top / 'upper', self._top / 'work'
        for path in (self._mount, self._upper, self._work):
            path.mkdir()
            os.chown(path, base, base)
        layer = bench.config.layers_dir / info['layer'] / 'root'
        overlay.mount(self._mount, layer=layer, upper=self._upper,
                      work=self._work, base_id=base)
        self._parent = bench.parent

    def close(self) -> None:
        overlay.unmount(self._mount)
        shutil.rmtree(self._top)
        shutil.rmtree(self._root)

    def _crun(self, *args: str) -> None:
        subprocess.run(
            [self._config.oci_runtime_path, '--root', str(self._root), *args],
            check=True, stdin=subprocess.DEVNULL, timeout=60)

    def once(self) -> dict[str, float]:
        name = str(uuidlib.uuid4())
        bundle = self._top / name
        bundle.mkdir()
        document = copy.deepcopy(self._document)
        document['root']['path'] = str(self._mount)
        document['linux']['cgroupsPath'] = f'/{self._parent}/{name}'
        (bundle / 'config.json').write_text(json.dumps(document))
        path = f'/run/{name}.sock'
        seconds = {}
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
            server.bind(path)
            server.listen(1)
            begin = time.perf_counter()
            self._crun('create', '--bundle', str(bundle),
                       '--console-socket', path, name)
            seconds['create'] = time.perf_counter() - begin
            connection, _ = server.accept()
            _, fds, _, _ = socket.recv_fds(connection, 4096, 1)
            connection.close()
        os.unlink(path)
        for verb, arguments in (('start', ('start',)),
                                ('delete', ('delete', '--force'))):
            begin = time.perf_counter()
            self._crun(*arguments, name)
            seconds[verb] = time.perf_counter() - begin
        for fd in fds:
            os.close(fd)
        shutil.rmtree(bundle)
        return seconds


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument('--runs', type=int, default=20)
    parser.add_argument('--image', default='busybox',
                        help='of tools/images (busybox)')
    parser.add_argument('--disk-limit', default='auto',
                        choices=('auto', 'project', 'loop', 'none'))
    args = parser.parse_args()
    common.image(args.image)
    common.inside_host()
    print(common.describe_machine())
    mine: dict[str, list[float]] = {}
    bare: dict[str, list[float]] = {}
    with common.Bench(args.disk_limit) as bench:
        ours(bench, args.image)
        side = Bare(bench, args.image)
        try:
            side.once()
            # In turn, so that both see the same machine.
            for _ in range(args.runs):
                for into, once in ((mine, ours(bench, args.image)),
                                   (bare, side.once())):
                    for verb, seconds in once.items():
                        into.setdefault(verb, []).append(seconds)
                    into.setdefault('total', []).append(sum(once.values()))
        finally:
            side.close()
        disk = bench.host.host_info()['disk_limit']

    def row(title: str, side: dict[str, list[float]], verb: str) -> (
            tuple[str, ...]):
        found = common.spread(side[verb])
        return (title, *(f'{found[key] * 1000:.1f}'
                         for key in ('median', 'min', 'max')))

    print(f'{args.runs} runs with {args.image}, disk limit by {disk}; ms')
    print(common.table(
        ['step', 'median', 'min', 'max'],
        [*(row(f'runtime: {verb}', mine, verb) for verb in mine),
         *(row(f'bare crun: {verb}', bare, verb) for verb in bare)]))
    common.write_json(args.json, {'lifecycle': {
        'image': args.image, 'disk_limit': disk,
        'runtime': {verb: common.spread(v) for verb, v in mine.items()},
        'bare': {verb: common.spread(v) for verb, v in bare.items()}}})
    return 0


if __name__ == '__main__':
    sys.exit(main())
