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

"""Prints a tempest.conf for the cloud of tools/cloud.sh.

What is switched off, containers or this cloud do not have; see
doc/source/support-matrix.ini.
"""

import configparser
import sys

from cloud import layout
from cloud import seed
from tests.cloud import base


class Images(base.CloudTestCase):
    """The image as the cloud's own tests have it."""

    def runTest(self):
        """Nothing."""


def _options() -> dict[str, dict[str, object]]:
    cloud = seed.connect()
    compute = cloud.compute
    images = Images()
    images.admin = cloud
    image = images.image('debian13').id
    public = cloud.network.find_network('public')
    extensions = ','.join(sorted(
        found.alias for found in cloud.network.extensions()))
    work = layout.WORK / 'tempest' / 'workspace'
    return {
        'DEFAULT': {'log_dir': work / 'logs', 'log_file': 'tempest.log',
                    'debug': True},
        'oslo_concurrency': {'lock_path': work / 'lock'},
        'auth': {
            'use_dynamic_credentials': True, 'admin_username': 'admin',
            'admin_password': layout.secret('admin'),
            'admin_project_name': 'admin', 'admin_domain_name': 'Default',
            'tempest_roles': 'member'},
        'identity': {
            'uri_v3': layout.URLS['identity'], 'region': layout.REGION,
            'v3_endpoint_type': 'public'},
        'service_available': {
            'cinder': False, 'swift': False, 'horizon': False,
            'glance': True, 'neutron': True, 'nova': True},
        'compute': {
            'image_ref': image, 'image_ref_alt': image,
            'flavor_ref': compute.find_flavor('pyc.small').id,
            'flavor_ref_alt': compute.find_flavor('pyc.medium').id,
            'min_compute_nodes': 2, 'min_microversion': '2.1',
            'max_microversion': 'latest', 'build_timeout': 300,
            'build_interval': 1, 'ready_wait': 0,
            'migration_source_host': '', 'migration_dest_host': '',
            'volume_backed_live_migration': False,
            'compute_volume_common_az': ''},
        'compute-feature-enabled': {
            'resize': True, 'cold_migration': True, 'live_migration': True,
            'live_migrate_back_and_forth': True,
            'block_migration_for_live_migration': True,
            'live_migrate_paused_instances': True, 'pause': True,
            'suspend': True, 'shelve': True, 'snapshot': True,
            'rescue': True, 'stable_rescue': False, 'change_password': True,
            'console_output': True, 'serial_console': True,
            'vnc_console': False, 'spice_console': False,
            'interface_attach': True,
            # Tempest looks for its block device, which containers have not.
            'config_drive': False,
            'metadata_service': True, 'enable_instance_password': True,
            'personality': True, 'attach_encrypted_volume': False,
            'swap_volume': False, 'volume_multiattach': False,
            'volume_backed_live_migration': False,
            'can_migrate_between_any_hosts': True,
            'xenapi_apis': False},
        'image': {'container_formats': 'bare,docker', 'disk_formats': 'raw'},
        'network': {
            'public_network_id': public.id,
            'floating_network_name': public.name,
            'project_network_cidr': '10.100.0.0/16'},
        'network-feature-enabled': {
            'ipv6': True, 'floating_ips': True,
            'api_extensions': extensions},
        'validation': {
            'run_validation': True, 'connect_method': 'floating',
            'auth_method': 'keypair', 'image_ssh_user': 'debian',
            'image_alt_ssh_user': 'debian', 'ssh_timeout': 180,
            'ssh_key_type': 'ecdsa', 'ip_version_for_ssh': 4,
            'network_for_ssh': 'public'},
        'scenario': {'dhcp_client': ''},
    }


def main() -> None:
    conf = configparser.RawConfigParser()
    conf.read_dict({
        section: {key: str(value) for key, value in options.items()}
        for section, options in _options().items()})
    conf.write(sys.stdout)


if __name__ == '__main__':
    main()
