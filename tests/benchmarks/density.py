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

"""Host memory for each idle instance, by the runtime alone.

    python -m tests.benchmarks.density [--instances N] [--image NAME]...

Starts N instances of each image, every one with a network port, a disk limit
and a console that is logged, waits until they are idle, and looks what the
host's memory has to carry for them: what the guests' own processes take, and
what is added to that. MemFree says nothing of the kind, as page cache and
free memory trade places all the time; so it is added up from control groups
and from the kernel's own counters, before and after. Those count for the
whole machine: run it on a quiet one, and the more instances the better.
"""

import os
import sys
import time
import typing as ty

from tests.benchmarks import common


#: Arguments for the init of a Debian image: without a cloud around it
#: cloud-init would wait for one, and the instance not be idle.
_INIT = {'argv': ['/sbin/init', 'cloud-init=disabled']}


class _Sample(ty.NamedTuple):
    kernel: dict[str, int]
    slabs: dict[str, int]
    keeper: int
    own: int


def _sample(bench: common.Bench) -> _Sample:
    return _Sample(
        common.kernel_memory(), common.slab_caches(),
        common.private_memory(bench.keeper_pid()),
        common.private_memory(os.getpid()))


def measure(bench: common.Bench, image: str, count: int) -> dict[str, ty.Any]:
    # What is made once and kept: caches of the kernel, of Python.
    more = {'init': _INIT} if image.startswith('debian') else {}
    warm = [bench.create(bench.spec(image, **more)) for _ in range(2)]
    bench.wait_idle(warm)
    for uuid in warm:
        bench.host.delete(uuid)
    for_a_process = common.slab_of_a_process()
    time.sleep(2)

    before = _sample(bench)
    begin = time.monotonic()
    uuids = [bench.create(bench.spec(image, **more)) for _ in range(count)]
    created = time.monotonic() - begin
    idle = bench.wait_idle(uuids)
    after = _sample(bench)
    for uuid in uuids:
        info = bench.host.info(uuid)
        if info['state'] != 'running':
            raise RuntimeError(
                f'{uuid} is {info["state"]}: {info["exit"]}\n' +
                bench.host.console_log(uuid, 2000).decode(errors='replace'))
    guests = [common.guest_memory(f'{bench.parent}/{uuid}')
              for uuid in uuids]
    begin = time.monotonic()
    for uuid in uuids:
        bench.host.delete(uuid)
    deleted = time.monotonic() - begin

    def each(total: float) -> float:
        return total / count

    kernel = {name: each(after.kernel[name] - before.kernel[name])
              for name in after.kernel}
    cache = kernel.pop('slab, reclaimable')
    processes = each(sum(g.processes for g in guests))
    process_kernel = each(sum(g.process_kernel for g in guests))
    process_slab = for_a_process * processes
    grown = sorted(
        ((each(size - before.slabs.get(name, 0)), name)
         for name, size in after.slabs.items()), reverse=True)
    keeper = each(after.keeper - before.keeper)
    added = sum(kernel.values()) - process_slab + keeper
    return {
        'image': image,
        'instances': count,
        'disk_limit': bench.host.host_info()['disk_limit'],
        'guest': {
            'processes': processes,
            'anonymous_bytes': each(sum(g.anonymous for g in guests)),
            'page_cache_bytes': each(sum(g.page_cache for g in guests)),
            'process_kernel_bytes': process_kernel,
            'process_slab_bytes': process_slab,
            'charged_kernel_bytes': each(sum(g.kernel for g in guests)),
        },
        'kernel': kernel,
        'kernel_bytes': sum(kernel.values()),
        'reclaimable_bytes': cache,
        'keeper_bytes': keeper,
        'runtime_process_bytes': each(after.own - before.own),
        'overhead_bytes': added,
        'largest_slabs': {name: size for size, name in grown[:12]},
        'seconds': {'create_each': each(created), 'until_idle': idle,
                    'delete_each': each(deleted)},
    }


def show(result: dict[str, ty.Any]) -> None:
    def kib(size: float) -> str:
        return f'{size / common.KIB:,.0f}'

    guest = result['guest']
    rows = [
        (f'guest: anonymous memory of {guest["processes"]:.1f} processes',
         kib(guest['anonymous_bytes'])),
        ('guest: their kernel stacks and page tables',
         kib(guest['process_kernel_bytes'])),
        ('guest: kernel objects that as many plain processes take',
         kib(guest['process_slab_bytes'])),
        ('guest: page cache charged to it (reclaimable)',
         kib(guest['page_cache_bytes'])),
        ('host: names and inodes (reclaimable)',
         kib(result['reclaimable_bytes'])),
        *((f'host: {name}', kib(size))
          for name, size in result['kernel'].items()),
        ('keeper: console, exit status', kib(result['keeper_bytes'])),
        ('ADDED: the last four, less those kernel objects',
         kib(result['overhead_bytes'])),
    ]
    print(f'{result["instances"]} idle instances of {result["image"]}, '
          f'disk limit by {result["disk_limit"]}; created in '
          f'{result["seconds"]["create_each"] * 1000:.0f} ms each, deleted '
          f'in {result["seconds"]["delete_each"] * 1000:.0f} ms each')
    print(common.table(['host memory for one instance', 'KiB'], rows))
    largest = ', '.join(f'{name} {kib(size)}' for name, size
                        in result['largest_slabs'].items() if size > 1024)
    print(f'largest slab caches (KiB for one): {largest}\n')


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument('--instances', type=int, default=50)
    parser.add_argument('--image', action='append',
                        help='of tools/images (busybox and debian13)')
    parser.add_argument('--disk-limit', default='auto',
                        choices=('auto', 'project', 'loop', 'none'))
    args = parser.parse_args()
    images = args.image or ['busybox', 'debian13']
    for name in images:
        common.image(name)
    common.inside_host()
    print(common.describe_machine())
    results = []
    wanted = 128 + 16 * args.instances
    with (common.inotify_instances(wanted) as had,
          common.Bench(args.disk_limit) as bench):
        if had < wanted:
            print(f'fs.inotify.max_user_instances is {had}, here {wanted} '
                  'while this runs')
        for name in images:
            results.append(measure(bench, name, args.instances))
            show(results[-1])
    common.write_json(args.json, {'density': results})
    return 0


if __name__ == '__main__':
    sys.exit(main())
