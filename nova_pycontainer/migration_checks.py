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

"""Whether a server can be live-migrated: Nova asks before it begins.

In this order: the destination (:meth:`Checks.destination`), the source
(:meth:`Checks.source`, within a minute), the destination again
(:meth:`Checks.outcome`). What is refused here costs nothing, and lets Nova
try another host.
"""

import contextlib

from nova import exception
from nova.i18n import _
from nova.image import glance
from nova.network import neutron
from oslo_log import log as logging
from oslo_utils import units

from nova_pycontainer import errors as driver_errors
from nova_pycontainer import migration_data
from nova_pycontainer.runtime import errors
from nova_pycontainer import spawn

LOG = logging.getLogger(__name__)


def refused(reason):
    return exception.MigrationPreCheckError(reason=reason)


@contextlib.contextmanager
def _refusing(instance):
    """Whatever is wrong, the server stays as it is, and Nova may look for
    another host. It does so for this exception only.
    """
    try:
        yield
    except errors.ContainerError as e:
        LOG.warning('The server cannot be live-migrated: %s', e,
                    instance=instance)
        raise refused(driver_errors.reason(e)) from e
    except exception.MigrationPreCheckError:
        raise
    except exception.MigrationError as e:
        raise refused(e.kwargs['reason']) from e


class Checks:
    """The checks of one host.

    :param client: client of the agent
    """

    def __init__(self, client):
        self._client = client
        self._network_api = neutron.API()
        self._image_api = glance.API()

    def destination(self, context, instance, source_record, record,
                    block_migration, disk_over_commit):
        """Whether this host could take the server.

        :param source_record: of the source's compute node
        :param record: of this host's
        :param block_migration: as asked for; None leaves it to the driver
        :returns: the object that goes through the migration
        """
        if block_migration is False:
            raise exception.InvalidSharedStorage(
                path=_('the root disk of the server'),
                reason=_('containers have it on their host. Migrate with '
                         'block_migration=auto or True'))
        with _refusing(instance):
            self._same_version(source_record, record)
            # So that a source of whom we could not know who it is fails now.
            migration_data.identity(
                source_record['cpu_info'],
                source_record['hypervisor_hostname'])
            free = self._client.host_info()['disk_free_bytes']
            self._free_range(instance)
        vifs = None
        if self._network_api.has_port_binding_extension(context):
            vifs = instance.get_network_info()
        return migration_data.create(
            vifs, disk_over_commit, free // units.Mi)

    @staticmethod
    def _same_version(source_record, record):
        theirs = source_record['hypervisor_version']
        ours = record['hypervisor_version']
        if theirs != ours:
            raise refused(
                _('the source speaks version %(theirs)s of the migration '
                  'protocol, this host speaks %(ours)s. Upgrade '
                  'nova-pycontainer on the older one') %
                {'theirs': theirs, 'ours': ours})

    def _free_range(self, instance):
        """A container has the same ids on every host."""
        base_id = instance.system_metadata.get(spawn.BASE_ID)
        for info in self._client.list():
            if info['uuid'] != instance.uuid and (
                    str(info['base_id']) == base_id):
                raise refused(
                    _('the host ids from %(base)s on, which the server has, '
                      'belong to %(other)s on this host. Give the hosts '
                      'disjoint ranges in [pycontainer]idmap_base and '
                      'idmap_count') %
                    {'base': base_id, 'other': info['uuid']})

    def source(self, instance, data, block_device_info):
        """Whether the server can leave this host.

        :returns: the object, with what the destination has to know
        """
        with _refusing(instance):
            migration_data.get(data)
            if (block_device_info or {}).get('block_device_mapping'):
                raise refused(_('it has volumes, which the container driver '
                                'cannot migrate yet'))
            info = self._client.info(instance.uuid)
            if info['state'] not in ('running', 'paused'):
                raise refused(_('its container is %s. Only a running or '
                                'paused server can be live-migrated') %
                              info['state'])
            migration_data.put(
                data, layer=info['layer'], image_id=info['image_id'],
                disk_used_bytes=info['disk']['used_bytes'] or 0)
        return data

    def outcome(self, context, instance, data, migration):
        """Whether this host can take it after what the source has said.

        :returns: the object, which names the migration from now on
        """
        with _refusing(instance):
            facts = migration_data.get(data)
            self._obtainable(context, facts['layer'], facts['image_id'])
            need = facts['disk_used_bytes']
            free = self._client.host_info()['disk_free_bytes']
            if need > free:
                raise refused(
                    _('the server has written %(need)d bytes to its disk, '
                      'this host has %(free)d left') %
                    {'need': need, 'free': free})
            migration_data.put(data, migration=migration.uuid)
        return data

    def _obtainable(self, context, layer, image_id):
        """:raises nova.exception.MigrationPreCheckError: the image is
            neither here nor in Glance
        """
        if self._client.layer_present(layer):
            return
        try:
            image = self._image_api.get(context, image_id)
        except (exception.ImageNotFound, exception.ImageNotAuthorized):
            image = None
        if image is None or image.get('status') != 'active':
            raise refused(
                _('image %s is not on this host, and not in Glance any '
                  'more. Upload it again, or migrate to a host that has '
                  'servers of it') % image_id)
