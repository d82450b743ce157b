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

"""Server create to ACTIVE, beside Nova's fake driver on the same cloud.

    python -m tests.benchmarks.create_active [--runs N] [--image NAME]

The fake driver does nothing at all, so its time is what Nova, Neutron and
the other services take; the difference is this driver's. Servers of both
kinds are made in turn, each with a port on the demo project's network, on a
host that has the image's layer already. What the driver did in that time is
taken from its own line in the log of nova-compute.

The cloud has to be up (tools/cloud.sh up); a compute service with the fake
driver is added and removed again.
"""

import pathlib
import re
import sys
import time
import typing as ty

from openstack import connection
from openstack import exceptions

from tests.benchmarks import common
from tests.cloud import base

#: "[instance: UUID] spawn took 1.234 s: image=0.002 network=0.481 …"
_LINE = re.compile(
    r'\[instance: (?P<uuid>[0-9a-f-]{36})\] spawn took '
    r'(?P<total>[0-9.]+) s: (?P<steps>.*)$')
_LIMIT = 180.0
HOST = 'host1'


class Cloud:
    """The administrator, who may choose a host, in the demo project."""

    def __init__(self) -> None:
        self.admin = base.connect('admin')
        identity = self.admin.identity
        project = identity.find_project('demo')
        identity.assign_project_role_to_user(
            project, identity.find_user('admin'),
            identity.find_role('admin'))
        self.demo: connection.Connection = base.connect(
            'admin', project_name='demo')
        self.network = self.admin.network.find_network(
            'private', project_id=project.id).id

    def image(self, name: str) -> str:
        path = common.image(name)
        found = self.admin.image.find_image(path.name)
        if found is None:
            found = self.admin.image.create_image(
                path.name, filename=str(path), disk_format='raw',
                container_format='bare', visibility='public')
        return str(self.admin.image.wait_for_status(found, 'active').id)

    def once(self, flavor: str, zone: str, image: str) -> (
            tuple[str, float, float]):
        """A server's id, seconds to ACTIVE, and seconds to its end."""
        compute = self.demo.compute
        chosen = compute.find_flavor(flavor, ignore_missing=False).id
        begin = time.monotonic()
        server = compute.create_server(
            name='bench-create-active', image_id=image, flavor_id=chosen,
            networks=[{'uuid': self.network}], availability_zone=zone)
        try:
            self._wait(server.id, 'ACTIVE')
            active = time.monotonic() - begin
        finally:
            begin = time.monotonic()
            compute.delete_server(server.id)
            self._wait(server.id, None)
        return server.id, active, time.monotonic() - begin

    def _wait(self, uuid: str, status: str | None) -> None:
        deadline = time.monotonic() + _LIMIT
        while True:
            try:
                found = self.demo.compute.get_server(uuid)
            except exceptions.NotFoundException:
                if status is None:
                    return
                raise
            if found.status == status:
                return
            if found.status == 'ERROR':
                raise RuntimeError(f'server {uuid}: {found.fault}')
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f'server {uuid} is {found.status} after {_LIMIT:.0f} s')
            time.sleep(0.05)


def driver_steps(log: pathlib.Path, uuids: ty.Collection[str]) -> (
        dict[str, list[float]]):
    """Seconds of each step of the spawns of these servers, and in total."""
    found: dict[str, list[float]] = {}
    with open(log, errors='replace') as lines:
        for line in lines:
            match = _LINE.search(line)
            if not match or match['uuid'] not in uuids:
                continue
            for item in match['steps'].split():
                name, _, seconds = item.partition('=')
                found.setdefault(name, []).append(float(seconds))
            found.setdefault('total', []).append(float(match['total']))
    return found


def measure(cloud: Cloud, image_name: str, runs: int) -> dict[str, ty.Any]:
    image = cloud.image(image_name)
    sides = {'pycontainer': ('pyc.tiny', f'nova:{HOST}'),
             'fake': ('fake.tiny', 'fake')}
    active: dict[str, list[float]] = {side: [] for side in sides}
    gone: dict[str, list[float]] = {side: [] for side in sides}
    uuids = set()
    # The first of each is not counted: the layer, caches, connections.
    for number in range(runs + 1):
        for side, (flavor, zone) in sides.items():
            uuid, up, down = cloud.once(flavor, zone, image)
            if number:
                active[side].append(up)
                gone[side].append(down)
                if side == 'pycontainer':
                    uuids.add(uuid)
    steps = driver_steps(base.LOGS / f'{HOST}.nova-compute.log', uuids)
    if len(steps.get('total', ())) != runs:
        raise RuntimeError(
            f'the log of nova-compute tells of {len(steps.get("total", ()))} '
            f'spawns, not of {runs}')
    return {
        'image': image_name,
        'to_active_s': {s: common.spread(v) for s, v in active.items()},
        'delete_s': {s: common.spread(v) for s, v in gone.items()},
        'ratio': (common.spread(active['pycontainer'])['median'] /
                  common.spread(active['fake'])['median']),
        'driver_steps_s': {s: common.spread(v) for s, v in steps.items()},
    }


def show(result: dict[str, ty.Any]) -> None:
    def row(title: str, figures: dict[str, float]) -> tuple[str, ...]:
        return (title, *(f'{figures[key]:.3f}'
                         for key in ('median', 'min', 'max')))

    titles = ['seconds', 'median', 'min', 'max']
    rows = []
    for key, text in (('to_active_s', 'create to ACTIVE'),
                      ('delete_s', 'delete to gone')):
        rows += [row(f'{text}, {side}', figures)
                 for side, figures in result[key].items()]
    print(common.table(titles, rows))
    print(f'ratio of create to ACTIVE: {result["ratio"]:.2f}\n')
    print("the driver's own share of it (spawn):")
    print(common.table(titles, [
        row(name, figures)
        for name, figures in result['driver_steps_s'].items()]))


def main() -> int:
    parser = common.parser(__doc__)
    parser.add_argument('--runs', type=int, default=10)
    parser.add_argument('--image', default='busybox',
                        help='of tools/images (busybox)')
    args = parser.parse_args()
    base.cloud_sh('status')
    print(common.describe_machine())
    base.cloud_sh('fake-host', 'up')
    try:
        result = measure(Cloud(), args.image, args.runs)
    finally:
        base.cloud_sh('fake-host', 'down')
    show(result)
    common.write_json(args.json, {'create_active': result})
    return 0


if __name__ == '__main__':
    sys.exit(main())
