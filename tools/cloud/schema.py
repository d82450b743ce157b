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

"""Databases: made once, kept for as long as the data is."""

import os

from cryptography import fernet

from cloud import config
from cloud import hosts
from cloud import layout
from cloud import process
from cloud import services

NAMES = ('keystone', 'glance', 'placement', 'neutron', 'nova_api',
         'nova_cell0', 'nova_cell1')


def _done(name: str) -> bool:
    return (layout.DATA / f'schema-{name}.done').exists()


def _mark(name: str) -> None:
    (layout.DATA / f'schema-{name}.done').touch()


def _run(name: str, *argv: str, accept: tuple[str, ...] = ()) -> None:
    try:
        hosts.run(layout.CONTROLLER, [services.venv(argv[0]), *argv[1:]],
                  user=layout.USER, timeout=600, log=f'schema-{name}')
    except process.ServiceError as error:
        if not any(text in str(error) for text in accept):
            raise


def create_databases() -> None:
    password = layout.secret('database')
    text = ''.join(f'CREATE DATABASE IF NOT EXISTS {name};'
                   for name in NAMES)
    text += (f"CREATE USER IF NOT EXISTS 'openstack'@'%' IDENTIFIED BY "
             f"'{password}';")
    text += ''.join(f"GRANT ALL ON {name}.* TO 'openstack'@'%';"
                    for name in NAMES)
    services.sql(text)


def keystone_keys() -> None:
    """What keystone-manage fernet_setup and credential_setup do, at once.

    The keys are kept with the data: tokens stay valid over a restart.
    """
    store = layout.DATA / 'keystone'
    for kind in ('fernet-keys', 'credential-keys'):
        path = store / kind
        path.mkdir(parents=True, exist_ok=True)
        for number in ('0', '1'):
            key = path / number
            if not key.exists():
                key.write_bytes(fernet.Fernet.generate_key())
                key.chmod(0o600)
            os.chown(key, layout.uid(layout.USER), layout.gid(layout.USER))
            hosts.write(layout.CONTROLLER, f'/etc/keystone/{kind}/{number}',
                        key.read_text(), 0o600, layout.USER)
        hosts.make_dir(layout.CONTROLLER, f'/etc/keystone/{kind}', 0o700,
                       layout.USER)


def keystone() -> None:
    if _done('keystone'):
        return
    base = ('keystone-manage', '--config-file',
            '/etc/keystone/keystone.conf')
    _run('keystone', *base, 'db_sync')
    url = layout.URLS['identity']
    _run('keystone', *base, 'bootstrap',
         '--bootstrap-password', layout.secret('admin'),
         '--bootstrap-region-id', layout.REGION,
         '--bootstrap-admin-url', url, '--bootstrap-public-url', url,
         '--bootstrap-internal-url', url)
    _mark('keystone')


def glance() -> None:
    if not _done('glance'):
        _run('glance', 'glance-manage', '--config-file',
             '/etc/glance/glance-api.conf', 'db_sync')
        _mark('glance')


def placement() -> None:
    if not _done('placement'):
        _run('placement', 'placement-manage', '--config-file',
             '/etc/placement/placement.conf', 'db', 'sync')
        _mark('placement')


def neutron() -> None:
    if not _done('neutron'):
        _run('neutron', 'neutron-db-manage', '--config-file',
             '/etc/neutron/neutron.conf', '--config-file',
             '/etc/neutron/ml2_conf.ini', 'upgrade', 'head')
        _mark('neutron')


def nova_api() -> None:
    if not _done('nova-api'):
        _run('nova', 'nova-manage', 'api_db', 'sync')
        _mark('nova-api')


def nova_cells() -> None:
    if _done('nova'):
        return
    _run('nova', 'nova-manage', 'cell_v2', 'map_cell0',
         '--database_connection', config.database('nova_cell0'))
    # Where it is there already, the exit code is 2.
    _run('nova', 'nova-manage', 'cell_v2', 'create_cell', '--name', 'cell1',
         '--transport-url', config.transport(),
         '--database_connection', config.database('nova_cell1'),
         accept=('exit code 2',))
    _run('nova', 'nova-manage', 'db', 'sync')
    _mark('nova')


def discover_hosts() -> None:
    _run('nova-discover', 'nova-manage', 'cell_v2', 'discover_hosts')
