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

"""The config drive: the same files that a virtual machine gets.

A container has no drive to mount; the runtime shows it the files as a
read-only directory, where cloud-init looks for them as well (``ds-identify``
and ``DataSourceConfigDrive`` accept ``/config-drive``).
"""

from nova.api.metadata import base as instance_metadata
from nova.virt import configdrive

from nova_pycontainer import injection


def files(instance, injected_files, admin_password, network_info):
    """Return path → base64 of the content, or None if there is no drive.

    :param injected_files: list of (path, content), from the API
    :param admin_password: generated or given by the user, or None
    """
    if not configdrive.required_by(instance):
        return None
    extra = {'admin_pass': admin_password} if admin_password else {}
    metadata = instance_metadata.InstanceMetadata(
        instance, content=injected_files, extra_md=extra,
        network_info=network_info)
    return {path: injection.encode(content)
            for path, content in metadata.metadata_for_config_drive()}
