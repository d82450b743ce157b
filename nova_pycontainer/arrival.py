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

"""Servers that come from another host while they are down.

What has come of one that fails stays, and so does what its source offers:
nothing is lost before all of it is here. ``system_metadata`` says which move
was the last one that came to that, so that the source may remove its files
(:meth:`.resize.Resizer.forget`).
"""

import time

from nova.compute import vm_states
from nova import exception
from nova.i18n import _
from nova import objects
from oslo_log import log as logging

from nova_pycontainer import flavor as driver_flavor
from nova_pycontainer import migration_data
from nova_pycontainer import migration_destination
from nova_pycontainer.runtime import errors
from nova_pycontainer import spawn
from nova_pycontainer import steps as driver_steps
from nova_pycontainer import transfer

LOG = logging.getLogger(__name__)

#: Errors of asking a host that is still booting: its agent does not listen,
#: or has not read yet what it offers.
_NOT_YET = ('network', 'timeout', 'forbidden', 'not_found')
_RETRY_S = 2.0

#: In ``system_metadata``: the last migration by which all of the server has
#: come to the host that it is on.
CAME = 'pycontainer_came'


def record_of(context, instance):
    """The migration that a server is in, or None."""
    moving = instance.migration_context
    return moving and objects.Migration.get_by_id_and_instance(
        context, moving.migration_id, instance.uuid)


class Arrivals:
    """The destination of cold migrations.

    :param client: client of the agent
    :param destination: a nova_pycontainer.migration_destination.Destination
    :param conf: the options of ``[pycontainer]``
    :param host: name of this compute service
    """

    def __init__(self, client, destination, conf, host):
        self._client = client
        self._destination = destination
        self._conf = conf
        self._host = host

    def take(self, context, instance, record, facts):
        """Have all of a server here; it is down after that.

        :param facts: what the source's agent has said of it
        :raises nova.exception.MigrationError: it is on its source still; to
            start it here tries the copy again
        :raises ContainerError: the same, of the agent's
        """
        # Volumes are connected when it is started.
        spec = facts['spec'] | {
            'volumes': [],
            'resources': driver_flavor.resources_of(
                instance, self._conf.pids_max)}
        with driver_steps.Steps('finish_migration', instance) as steps:
            with steps.step('leftovers'):
                self._destination.remove_leftovers(instance)
            with steps.step('layer'):
                if spec['layer']:
                    self._destination.get_layer(context, instance, spec)
            with steps.step('take'):
                self._client.transfer_take(
                    instance.uuid, record.uuid, spec, facts,
                    migration_destination.options(self._conf))
                transfer.wait(self._client, self._conf, instance, record.uuid)
            self.note(instance, self._client.info(instance.uuid))
            steps.success()

    def go_on(self, context, instance, record):
        """Have all of a server here of which nova-compute does not know how
        much has come, since it was restarted meanwhile.

        :raises nova.exception.MigrationError, ContainerError: as for
            :meth:`take`
        """
        info = self._client.find(instance.uuid)
        if info is None or record.uuid not in (
                info['incoming'], info['arrived']):
            # What is here is of an earlier stay.
            self._ask_and_take(context, instance, record)
        elif info['incoming'] is None:
            self.note(instance, info)
        elif self._is_coming(record):
            transfer.wait(self._client, self._conf, instance, record.uuid)
            self.note(instance, self._client.info(instance.uuid))
        else:
            self.rest(instance)

    def _ask_and_take(self, context, instance, record):
        self.take(context, instance, record,
                  self._ask(context, instance, record))

    def _ask(self, context, instance, record):
        return self._client.transfer_describe(
            instance.uuid, record.uuid, migration_data.recorded_identity(
                context, record.source_compute))

    def wait_for_source(self, context, instance, record, limit_s):
        """Wait until :meth:`go_on` can have what it needs from the source.

        :param limit_s: seconds; after them it is for go_on to fail
        """
        deadline = time.monotonic() + limit_s
        while not self._is_here(instance, record):
            try:
                self._ask(context, instance, record)
                return
            except errors.ContainerError as e:
                if e.code not in _NOT_YET or time.monotonic() > deadline:
                    return
                LOG.warning('Waiting for host %s, which it comes from: %s',
                            record.source_compute, e, instance=instance)
            time.sleep(_RETRY_S)

    def _is_here(self, instance, record):
        info = self._client.find(instance.uuid)
        return info is not None and info['incoming'] is None and (
            info['arrived'] == record.uuid)

    def rest(self, instance):
        """Copy the rest of a server whose copy has failed.

        :raises nova.exception.MigrationError, ContainerError: as for
            :meth:`take`
        """
        LOG.warning('Its files have not all come from where it was; trying '
                    'that again', instance=instance)
        migration = self._client.transfer_resume(instance.uuid)['migration']
        transfer.wait(self._client, self._conf, instance, migration)
        self.note(instance, self._client.info(instance.uuid))

    def missing(self, context, instance):
        """Have a server here that Nova says is here.

        :raises nova.exception.InstancePowerOnFailure: it is not, and no
            other host offers it
        :raises nova.exception.MigrationError, ContainerError: as for
            :meth:`take`
        """
        record = record_of(context, instance)
        if record is None or came(instance) == record.uuid or (
                record.dest_compute != self._host or
                record.source_compute == self._host):
            raise exception.InstancePowerOnFailure(
                reason=_('its root disk is not on this host. Rebuild the '
                         'server, or restore the disk'))
        LOG.warning('It has not come from host %s; trying that again',
                    record.source_compute, instance=instance)
        self.go_on(context, instance, record)

    @staticmethod
    def note(instance, info):
        """Let the source know that all of a server has come.

        :param info: what the agent says of it
        """
        if info.get('arrived') in (None, came(instance)):
            return
        instance.system_metadata[spawn.BASE_ID] = str(info['base_id'])
        instance.system_metadata[CAME] = info['arrived']
        # Now: it is what the files of the source wait for.
        instance.save()

    def _is_coming(self, record):
        """Whether the agent copies it, or has copied it."""
        try:
            phase = self._client.migration_status(record.uuid)['phase']
        except errors.ContainerError as e:
            if e.code != 'not_found':
                raise
            return False
        return phase not in ('failed', 'aborted')


def came(instance):
    """The uuid of the last migration that has brought all of a server."""
    return instance.system_metadata.get(CAME)


def goes_back(instance):
    """What has come is about to be removed: the source has the server."""
    if instance.system_metadata.pop(CAME, None) is not None:
        instance.save()


def is_made_anew(context, instance):
    """It has the files of an image now, wherever others are left."""
    if instance.vm_state == vm_states.BUILDING:
        return
    record = record_of(context, instance)
    if record is not None:
        # The compute manager saves it with the instance.
        instance.system_metadata[CAME] = record.uuid


def has_come(context, instance, migration):
    """Whether all of a server has come by a migration, or by a later one.

    :param migration: its uuid
    """
    last = came(instance)
    if last in (None, migration):
        return last is not None
    try:
        return (objects.Migration.get_by_uuid(context, last).id >
                objects.Migration.get_by_uuid(context, migration).id)
    except exception.MigrationNotFound:
        return False
