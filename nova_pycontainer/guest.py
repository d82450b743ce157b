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

"""What Nova has done inside a guest."""

from nova import exception
from nova.i18n import _
from oslo_log import log as logging

LOG = logging.getLogger(__name__)

_CHPASSWD = '/usr/sbin/chpasswd'
_TIMEOUT_S = 30.0
#: Of exec when there is no such program, as of a shell.
_NOT_FOUND = (126, 127)


def set_admin_password(client, instance, password):
    """Set the password of the guest's administrator.

    The image's property ``os_admin_user`` names him, else it is root.

    :param client: client of the agent
    :raises nova.exception.SetAdminPasswdNotSupported: the guest has no
        chpasswd(8)
    :raises nova.exception.InstancePasswordSetFailed: in words without the
        password
    :raises ContainerError: the agent's
    """
    user = instance.image_meta.properties.get('os_admin_user', 'root')
    if any(c in password + user for c in '\n\0') or ':' in user:
        raise exception.InstancePasswordSetFailed(
            instance=instance.uuid,
            reason=_('neither it nor the name of the user may have a line '
                     'break, nor the name a colon'))
    done = client.exec(
        instance.uuid, [_CHPASSWD], stdin=f'{user}:{password}\n'.encode(),
        env={'PATH': '/usr/sbin:/usr/bin:/sbin:/bin'}, timeout_s=_TIMEOUT_S)
    if done['exit_code'] in _NOT_FOUND:
        raise exception.SetAdminPasswdNotSupported()
    if done['exit_code']:
        # What it printed is the guest's, and may have the password in it.
        LOG.warning('chpasswd in the guest ended with %d', done['exit_code'],
                    instance=instance)
        raise exception.InstancePasswordSetFailed(
            instance=instance.uuid,
            reason=_('chpasswd in the guest ended with %d') %
            done['exit_code'])
