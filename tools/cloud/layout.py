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

"""Names, addresses and paths of the test cloud."""

import grp
import json
import os
import pathlib
import pwd
import secrets

WORK = pathlib.Path(os.environ.get('WORK') or
                    os.environ.get('NOVA_PYCONTAINER_WORK') or
                    '/var/tmp/nova-pycontainer')
REPO = pathlib.Path(__file__).resolve().parents[2]
VENV = WORK / 'venv'
PREFIX = WORK / 'prefix'
CLOUD = WORK / 'cloud'
#: Survives ``down``; removed by ``down --purge``.
DATA = CLOUD / 'data'
#: The driver that the hosts ran with when they were last up.
DRIVER = DATA / 'driver'
#: Describes what runs at present; empty when the cloud is down.
RUN = CLOUD / 'run'
LOGS = WORK / 'logs' / 'cloud'
#: Private file systems of the hosts (/etc, /var/lib), made anew at each up.
HOSTS = CLOUD / 'hosts'

CONTROLLER = 'controller'
COMPUTES = ('host1', 'host2')
ALL_HOSTS = (CONTROLLER, *COMPUTES)
#: The compute service with Nova's fake driver; lives on the controller.
FAKE_HOST = 'fake1'

# Documentation and benchmark ranges: they collide with no real network.
UNDERLAY = {'controller': '198.51.100.10', 'host1': '198.51.100.11',
            'host2': '198.51.100.12'}
#: This machine's own address in the underlay.
OUTSIDE = '198.51.100.1'
#: A plain veth between the hosts, for bulk data: the underlay goes through
#: the userspace datapath of Open vSwitch, which is slow.
MIGRATION = {'host1': '198.18.0.11', 'host2': '198.18.0.12'}
PUBLIC_CIDR = '192.0.2.0/24'
PUBLIC_GATEWAY = '192.0.2.1'
PUBLIC_POOL = ('192.0.2.10', '192.0.2.250')
PRIVATE_CIDR = '203.0.113.0/24'
#: The one network device that the cloud has in the machine's own network
#: namespace: the way from here to the APIs and the floating IPs.
OUTSIDE_LINK = 'pyc-mgmt'

API = UNDERLAY[CONTROLLER]
PORTS = {'keystone': 5000, 'glance': 9292, 'placement': 8778,
         'neutron': 9696, 'nova-api': 8774, 'nova-metadata': 8775,
         'serialproxy': 6083, 'mariadb': 3306, 'rabbitmq': 5672,
         'memcached': 11211, 'ovn-nb': 6641, 'ovn-sb': 6642}
URLS = {'identity': f'http://{API}:5000/v3',
        'image': f'http://{API}:9292',
        'placement': f'http://{API}:8778',
        'network': f'http://{API}:9696',
        'compute': f'http://{API}:8774/v2.1'}
REGION = 'RegionOne'

#: The unprivileged user of the OpenStack services.
USER = 'nova'

CGROUP_PARENT = 'pycontainer-{host}'

_SECRETS = ('admin', 'demo', 'service', 'database', 'rabbit', 'metadata',
            'fernet')


def secret(name: str) -> str:
    """A password that stays the same for as long as the data does."""
    path = DATA / 'secrets.json'
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {key: secrets.token_hex(12) for key in _SECRETS}
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), 'w') as out:
            json.dump(values, out)
    return json.loads(path.read_text())[name]


def uid(user: str) -> int:
    return pwd.getpwnam(user).pw_uid


def gid(group: str) -> int:
    return grp.getgrnam(group).gr_gid


def openrc(user: str, project: str) -> dict[str, str]:
    return {'OS_AUTH_URL': URLS['identity'],
            'OS_IDENTITY_API_VERSION': '3',
            'OS_USERNAME': user,
            'OS_PASSWORD': secret(user),
            'OS_PROJECT_NAME': project,
            'OS_USER_DOMAIN_NAME': 'Default',
            'OS_PROJECT_DOMAIN_NAME': 'Default',
            'OS_REGION_NAME': REGION,
            'OS_INTERFACE': 'public'}
