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
from nova.network import neutron
from oslo_log import log as logging
from oslo_utils import units

from nova_pycontainer import cpus
from nova_pycontainer import errors as driver_errors
from nova_pycontainer import migration_data
from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime.migration import versions

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
    except (exception.MigrationError, exception.InvalidInput) as e:
        raise refused(e.kwargs['reason']) from e


class Checks:
    """The checks of one host.

    :param client: client of the agent
    """

    def __init__(self, client):
        self._client = client
        self._network_api = neutron.API()

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
            cpus.check(instance.numa_topology)
            self._same_version(source_record, record)
            # So that a source of whom we could not know who it is fails now.
            source = migration_data.identity(
                source_record['cpu_info'],
                source_record['hypervisor_hostname'])
            info = self._client.host_info()
            self._check_formats(
                source, source_record['hypervisor_hostname'],
                info['migration'], record['hypervisor_hostname'])
            free = info['disk_free_bytes']
        vifs = None
        if self._network_api.has_port_binding_extension(context):
            vifs = instance.get_network_info()
        data = migration_data.create(
            vifs, disk_over_commit, free // units.Mi,
            **versions.told(info['migration']))
        if instance.numa_topology is not None:
            # The manager then claims CPUs here, if the source says so too.
            data.dst_supports_numa_live_migration = True
        return data

    @staticmethod
    def _same_version(source_record, record):
        found = versions.difference(
            source_record['hypervisor_version'],
            source_record['hypervisor_hostname'],
            record['hypervisor_version'], record['hypervisor_hostname'])
        if found is not None:
            raise refused('. '.join(found))

    @staticmethod
    def _check_formats(source, source_name, destination, destination_name):
        """:param source, destination: what the hosts tell of themselves"""
        found = versions.too_new(
            versions.format_of(source), source_name,
            versions.format_of(destination), destination_name)
        if found is not None:
            raise refused('. '.join(found))

    def source(self, instance, data):
        """Whether the server can leave this host.

        :returns: the object, with what the destination has to know
        """
        with _refusing(instance):
            told = migration_data.get(data)
            self._check_formats(
                self._client.host_info()['migration'], instance.host, told,
                # Nova names it beside what is said here.
                told.get('hostname') or _('the destination'))
            found = self._client.migration_check_source(instance.uuid)
            _judge(found, instance)
            migration_data.put(data, facts=found['facts'])
            if instance.numa_topology is not None:
                data.src_supports_numa_live_migration = True
        return data

    @staticmethod
    def claimed(data, claim):
        """Note the CPUs that the manager has claimed on this host."""
        if claim.claimed_numa_topology is not None:
            data.dst_numa_info = cpus.claimed(claim.claimed_numa_topology)
        return data

    def outcome(self, context, instance, data, migration):
        """Whether this host can take it after what the source has said.

        :returns: the object, which names the migration from now on
        """
        with _refusing(instance):
            facts = migration_data.get(data)['facts']
            found = self._client.migration_check_destination(facts)
            _judge(found, instance, self._leftover(instance))
            migration_data.put(data, migration=migration.uuid)
        return data

    def _leftover(self, instance):
        """Which problem is none.

        What an earlier stay has left here is removed in
        ``pre_live_migration``.
        """
        info = self._client.find(instance.uuid)
        if info is None or info['state'] in ('running', 'paused'):
            return None
        return 'exists'


def _judge(found, instance, ignored=None):
    """Refuse for what the agent has found.

    :raises nova.exception.MigrationPreCheckError: there are problems
    """
    for warning in found['warnings']:
        LOG.warning('Live migration: %s', _text(warning), instance=instance)
    problems = [_text(problem) for problem in found['problems']
                if problem['name'] != ignored]
    if problems:
        raise refused('; '.join(problems))


def _text(problem):
    process = problem.get('process')
    text = f'{problem["reason"]}. {problem["remedy"]}'
    return f'{process}: {text}' if process else text
