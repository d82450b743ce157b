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

"""Cold migration and resize: on the source, then on the destination.

Nova tells the source first and the destination last, so that the destination
comes for the files, over the channel of the agents. The source keeps its copy
until the user confirms, and starts it again if the user reverts.

A resize on the same host leaves the container where it is.
"""

from nova.compute import vm_states
from nova import exception
from nova.i18n import _
from nova import objects
from oslo_log import log as logging

from nova_pycontainer import arrival
from nova_pycontainer import cpus
from nova_pycontainer import errors as driver_errors
from nova_pycontainer import flavor as driver_flavor
from nova_pycontainer import migration_data
from nova_pycontainer import migration_destination
from nova_pycontainer import power
from nova_pycontainer.runtime import disk
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import versions
from nova_pycontainer import spawn
from nova_pycontainer import steps as driver_steps

LOG = logging.getLogger(__name__)


class Resizer:
    """Moves servers that are down, and changes their flavors.

    :param client: client of the agent
    :param conf: the options of ``[pycontainer]``
    :param host: name of this compute service
    """

    def __init__(self, client, spawner, power, arrivals, volumes, conf,
                 host):
        self._client = client
        self._volumes = volumes
        self._spawner = spawner
        self._power = power
        self._arrivals = arrivals
        self._conf = conf
        self._host = host

    # Source

    def leave(self, context, instance, flavor, network_info,
              block_device_info, timeout):
        """Stop the server, and let its new host have it.

        :param timeout: seconds that the guest has to shut down by itself
        :returns: what :meth:`arrive` has to know
        :raises nova.exception.InstanceFaultRollback: it goes on as before
        """
        record = arrival.record_of(context, instance)
        info = self._client.info(instance.uuid)
        try:
            self._check(instance, flavor, info, self._is_here(record))
            peer = (None if self._is_here(record) else
                    self._peer(context, instance, record.dest_compute))
        except exception.NovaException as e:
            raise exception.InstanceFaultRollback(e) from e
        try:
            with driver_steps.Steps('resize', instance) as steps:
                with steps.step('stop', lambda: self._again(
                        context, instance, network_info, info)):
                    self._client.stop(
                        instance.uuid, power.shutdown_s(timeout))
                facts = {}
                if peer is not None:
                    def take_back():
                        self._client.transfer_withdraw(instance.uuid)

                    with steps.step('offer', take_back):
                        facts = self._client.transfer_offer(
                            instance.uuid, record.uuid, peer,
                            migration_destination.options(self._conf))
                with steps.step('unplug_vifs'):
                    # One port is of one host.
                    self._spawner.unplug(instance, network_info)
                steps.success()
            # Nova tells Cinder now that this host has none of them.
            self._volumes.disconnect_all(block_device_info, instance)
        except (errors.ContainerError, exception.NovaException) as e:
            if isinstance(e, errors.ContainerError):
                e = driver_errors.to_nova(e, failure=exception.ResizeError)
            raise exception.InstanceFaultRollback(e) from e
        return migration_data.dump_disk_info(
            facts=facts, here=peer is None, migration=record.uuid)

    def _peer(self, context, instance, host):
        """What the database says of the agent of the new host.

        :raises nova.exception.NovaException: it cannot take the server
        """
        base_id = instance.system_metadata.get(spawn.BASE_ID)
        for other in objects.InstanceList.get_by_host(
                context, host, expected_attrs=['system_metadata']):
            if other.system_metadata.get(spawn.BASE_ID) == base_id:
                raise exception.ResizeError(reason=_(
                    'server %(other)s on host %(host)s has the same range of '
                    'host ids. Try another host') %
                    {'other': other.uuid, 'host': host})
        peer = migration_data.recorded_identity(context, host)
        found = versions.of(peer, 'destination')
        if found is not None:
            raise exception.ResizeError(reason='. '.join(found))
        return peer

    def _is_here(self, record):
        """Whether source and destination are one host, this one."""
        return record.source_compute == record.dest_compute

    def _check(self, instance, flavor, info, here):
        """:raises nova.exception.NovaException: there cannot be such a server
        """
        new = driver_flavor.resources(
            flavor, self._conf.pids_max, on_volume=bool(info.get('root')))
        driver_flavor.nesting(instance, flavor)
        moving = instance.migration_context
        cpus.check(moving and moving.new_numa_topology)
        if info.get('root'):
            # Of a volume, not of the flavor's size.
            return
        old = info['resources'].get('disk_bytes')
        if new['disk_bytes'] and old and new['disk_bytes'] < old:
            raise exception.ResizeError(reason=_(
                'the root disk of flavor %s is smaller than the one that the '
                'server has, which is not made smaller') % flavor.name)
        method = info['disk']['method']
        if here and method != 'none' and (
                not old and new['disk_bytes'] or
                old and not new['disk_bytes'] and method in disk.IN_FILE):
            raise exception.ResizeError(reason=_(
                'on one host, a root disk of any size cannot become one of a '
                'certain size, nor the other way round'))

    def _again(self, context, instance, network_info, info):
        if info['state'] in power.ALIVE:
            self._power.on(context, instance, network_info)

    def confirm(self, instance, network_info, record):
        """Remove what the server has left here."""
        if not self._is_here(record):
            self._spawner.remove(instance, network_info)

    def revert(self, context, instance, network_info, block_device_info,
               power_on):
        """Have the server here again, as it was before.

        Also after a crash at any point before it was another host's.
        """
        self._client.transfer_withdraw(instance.uuid)
        if power_on:
            self._power.on(
                context, instance, network_info, block_device_info)

    # Destination

    def arrive(self, context, instance, record, disk_info, network_info,
               block_device_info, power_on):
        """Get the server, and start it with its new flavor.

        :param disk_info: of :meth:`leave`, or of
            :mod:`nova_pycontainer.resize_recovery`
        :raises nova.exception.MigrationError: it is on its source still;
            to start it here tries the copy again
        :raises ContainerError: the same, of the agent's
        """
        told = migration_data.load_disk_info(disk_info)
        if not told['here']:
            if told['facts'] is None:
                self._arrivals.go_on(context, instance, record)
            else:
                self._arrivals.take(context, instance, record, told['facts'])
        if power_on:
            # What has come stays, whatever becomes of that: it is the server.
            self._power.on(
                context, instance, network_info, block_device_info)

    def stays(self, context, instance):
        """Whether a server whose resize is reverted was resized here.

        Nova has it destroyed in its new size before it has the old one
        again.
        """
        record = arrival.record_of(context, instance)
        return record is not None and self._is_here(record)

    def shut_down(self, instance, network_info, block_device_info):
        """All of :meth:`.spawn.Spawner.remove` but the loss of the disk."""
        self._power.off(instance, 0)
        self._spawner.unplug(instance, network_info)
        self._volumes.disconnect_all(block_device_info, instance)

    def forget(self, context):
        """Remove what servers have left here whose migration did not come to
        its end, and that were deleted since or have got over it elsewhere.
        """
        for info in self._client.list():
            if (info.get('moved') or info.get('offered')) and (
                    self._is_over(context, info)):
                LOG.warning('Removing what is left of server %s, which has '
                            'moved to another host, or was to', info['uuid'])
                self._client.delete(info['uuid'])

    def _is_over(self, context, info):
        try:
            instance = objects.Instance.get_by_uuid(
                context, info['uuid'], expected_attrs=['system_metadata'])
        except exception.InstanceNotFound:
            return True
        if info.get('moved') and (
                instance.vm_state == vm_states.SHELVED_OFFLOADED):
            # It has gone there, and to Glance since.
            return instance.task_state is None
        if instance.host in (None, self._host) or (
                instance.task_state is not None):
            return False
        if info.get('moved'):
            # It runs there, as the agents have settled it.
            return True
        if instance.vm_state in (vm_states.RESIZED, vm_states.ERROR):
            return False
        # What its state is said to be anybody can have changed who may.
        # These files are the only ones until all of them have come.
        return arrival.has_come(context, instance, info['offered'])
