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

"""The agent's verbs: their parameters, limits, and who does them."""

import typing as ty

import jsonschema

from nova_pycontainer.agent import protocol
from nova_pycontainer.runtime import errors

Schema = dict[str, ty.Any]

MIB: ty.Final = 1 << 20

# \Z, because Python's $ lets a newline follow.
_UUID: ty.Final[Schema] = {
    'type': 'string',
    'pattern': '^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\\Z',
}
_KEY: ty.Final[Schema] = {
    'type': 'string', 'pattern': '^[a-z0-9]+-[0-9a-zA-Z]{16,128}\\Z'}
#: Seconds; a day is the longest that anything may be told to wait.
_SECONDS: ty.Final[Schema] = {
    'type': 'number', 'minimum': 0, 'maximum': 86400}
# What stands inside is the runtime's to check.
_OBJECT: ty.Final[Schema] = {'type': 'object'}
_CHANGES: ty.Final[Schema] = {'type': ['object', 'null']}
_DEVNAME: ty.Final[Schema] = {
    'type': 'string', 'pattern': '^[^/\\s\\x00]{1,15}\\Z'}
# Without NUL: it ends an argument for the kernel.
_TEXT: ty.Final[Schema] = {'type': 'string', 'pattern': '^[^\\x00]*\\Z'}


class Verb(ty.NamedTuple):
    """One verb.

    :param method: path of the method from
        :class:`nova_pycontainer.runtime.host.Host`, which takes the
        parameters by name
    :param properties: parameter → schema; a "?" marks one that may be left
        out
    :param limit_s: seconds that it may take if the client does not say, not
        counting a ``timeout_s`` among its parameters
    :param max_body: bytes
    :param waits: it waits for something else to happen most of the time, and
        by itself ends in time
    """

    method: str
    properties: dict[str, Schema]
    limit_s: float = 60.0
    max_body: int = MIB
    waits: bool = False


VERBS: ty.Final[dict[str, Verb]] = {
    # View
    'host_info': Verb('host_info', {}),
    'list': Verb('list', {}),
    'info': Verb('info', {'uuid': _UUID}),
    'events': Verb(
        'events', {'after': {'type': 'integer'}, 'timeout_s': {
            **_SECONDS, 'maximum': protocol.MAX_POLL}}, waits=True),
    # Layers; the import is a PUT
    'layer_present': Verb('layer_present', {'key': _KEY}),
    'layer_list': Verb('layer_list', {}),
    'layer_delete': Verb('layer_delete', {'key': _KEY}, limit_s=300.0),
    # Network
    'plug': Verb('plug', {
        'uuid': _UUID, 'nics': {'type': 'array', 'items': _OBJECT}}),
    'unplug': Verb('unplug', {
        'uuid': _UUID, 'devnames': {'type': 'array', 'items': _DEVNAME}}),
    'interface_attach': Verb(
        'interfaces.attach', {'uuid': _UUID, 'nic': _OBJECT}),
    'interface_detach': Verb(
        'interfaces.detach', {'uuid': _UUID, 'devname': _DEVNAME}),
    # Volumes
    'volume_attach': Verb(
        'volumes.attach', {'uuid': _UUID, 'volume': _OBJECT}),
    'volume_detach': Verb(
        'volumes.detach', {'uuid': _UUID, 'volume': _TEXT}),
    'volume_swap': Verb('swaps.begin', {
        'uuid': _UUID, 'old': _TEXT, 'volume': _OBJECT}),
    'volume_swap_status': Verb('swaps.status', {'uuid': _UUID}),
    'volume_swap_abort': Verb('swaps.abort', {'uuid': _UUID}),
    # Life. A config drive may hold 64 MiB, in base64.
    'define': Verb('define', {'uuid': _UUID, 'spec': _OBJECT},
                   max_body=96 * MIB),
    'prepare': Verb('prepare', {'uuid': _UUID, 'changes?': _CHANGES},
                    limit_s=120.0, max_body=96 * MIB),
    'start': Verb('start_container', {'uuid': _UUID}),
    'stop': Verb('stop', {'uuid': _UUID, 'timeout_s': _SECONDS}),
    'kill': Verb('kill', {'uuid': _UUID}),
    'reboot': Verb('reboot', {
        'uuid': _UUID, 'timeout_s': _SECONDS, 'changes?': _CHANGES},
        limit_s=180.0, max_body=96 * MIB),
    'pause': Verb('pause', {'uuid': _UUID}),
    'unpause': Verb('unpause', {'uuid': _UUID}),
    # What it has written goes to its disks, at their speed.
    'quiesce': Verb('quiesces.begin', {
        'uuid': _UUID, 'limit_s': {**_SECONDS, 'exclusiveMinimum': 0}},
        limit_s=120.0),
    'unquiesce': Verb('quiesces.end', {'uuid': _UUID}),
    # The memory goes to a disk, at the disk's speed.
    'suspend': Verb('checkpoints.suspend', {'uuid': _UUID}, limit_s=1800.0),
    'resume': Verb('checkpoints.resume', {
        'uuid': _UUID, 'changes?': _CHANGES}, limit_s=1800.0,
        max_body=96 * MIB),
    'delete': Verb('delete', {
        'uuid': _UUID, 'keep_disk?': {'type': 'boolean'}}, limit_s=300.0),
    # Rescue. A config drive may hold 64 MiB, in base64.
    'rescue': Verb('rescues.begin', {'uuid': _UUID, 'spec': _OBJECT},
                   max_body=96 * MIB),
    'unrescue': Verb('rescues.end', {'uuid': _UUID}, limit_s=300.0),
    # Migration
    'migration_prepare': Verb('migrations.prepare', {
        'uuid': _UUID, 'migration': _UUID, 'spec': _OBJECT,
        'source': _OBJECT, 'options?': _CHANGES},
        limit_s=180.0, max_body=96 * MIB),
    'migration_begin': Verb('migrations.begin', {
        'uuid': _UUID, 'migration': _UUID, 'destination': _OBJECT,
        'options?': _CHANGES}),
    'migration_status': Verb('migrations.status', {
        'migration': _UUID, 'wait_s?': {**_SECONDS, 'maximum': 30}},
        limit_s=90.0),
    'migration_force_complete': Verb(
        'migrations.force_complete', {'migration': _UUID}),
    'migration_abort': Verb('migrations.abort', {
        'migration': _UUID, 'reason': _TEXT}, limit_s=120.0),
    # It asks the other host once, and waits for the end.
    'migration_resolve': Verb('migrations.resolve', {
        'uuid': _UUID, 'runs': {'enum': ['here', 'elsewhere']}},
        limit_s=180.0),
    # Cold migration. As above, of a container that is down.
    'transfer_offer': Verb('transfers.offer', {
        'uuid': _UUID, 'migration': _UUID, 'destination': _OBJECT,
        'options?': _CHANGES}),
    'transfer_withdraw': Verb('transfers.withdraw', {'uuid': _UUID}),
    'transfer_describe': Verb('transfers.describe', {
        'uuid': _UUID, 'migration': _UUID, 'source_host': _OBJECT},
        limit_s=120.0),
    'transfer_take': Verb('transfers.take', {
        'uuid': _UUID, 'migration': _UUID, 'spec': _OBJECT,
        'facts': _OBJECT, 'options?': _CHANGES}, limit_s=180.0),
    'transfer_resume': Verb('transfers.resume', {'uuid': _UUID}),
    'migration_check_source': Verb(
        'checks.source', {'uuid': _UUID}, limit_s=60.0),
    'migration_check_destination': Verb(
        'checks.destination', {'facts': _OBJECT}),
    'preflight': Verb('preflight.run', {}, limit_s=300.0),
    # In the guest
    'exec': Verb('exec', {
        'uuid': _UUID,
        'argv': {'type': 'array', 'items': _TEXT, 'minItems': 1},
        'stdin?': {'type': 'bytes'},
        'env?': {'type': ['object', 'null'],
                 'additionalProperties': _TEXT,
                 'propertyNames': {'pattern': '^[^=\\x00]+\\Z'}},
        'timeout_s?': {**_SECONDS, 'exclusiveMinimum': 0},
        'max_output?': {
            'type': 'integer', 'minimum': 0, 'maximum': 16 * MIB}},
        max_body=32 * MIB),
    'console_log': Verb('console_log', {
        'uuid': _UUID, 'max_bytes?': {
            'type': 'integer', 'minimum': 1, 'maximum': 64 * MIB}}),
    'console_token': Verb('consoles.token', {'uuid': _UUID}),
    # Only as an upgrade: see the server.
    'console_attach': Verb('consoles.connect', {'uuid': _UUID}),
}


def _validator(verb: Verb) -> ty.Any:
    base = jsonschema.Draft202012Validator
    checker = base.TYPE_CHECKER.redefine(
        'bytes', lambda _, value: isinstance(value, bytes))
    return jsonschema.validators.extend(base, type_checker=checker)({
        'type': 'object',
        'properties': {
            name.rstrip('?'): schema
            for name, schema in verb.properties.items()},
        'required': [
            name for name in verb.properties if not name.endswith('?')],
        'additionalProperties': False,
    })


_VALIDATORS: ty.Final = {
    name: _validator(verb) for name, verb in VERBS.items()}


def check(name: str, params: object) -> dict[str, ty.Any]:
    """Return the parameters of a verb if they are right.

    :raises ContainerError: ``invalid``, naming the parameter
    """
    error = jsonschema.exceptions.best_match(
        _VALIDATORS[name].iter_errors(params))
    if error is not None:
        where = '/'.join(str(part) for part in error.absolute_path)
        # The value may be a secret, or very long.
        said = error.message
        if len(said) > 200:
            said = f'it does not match {error.validator}'
        raise errors.ContainerError(
            'invalid', f'{name}: wrong parameter'
            f'{"s" if not where else f" {where}"}', cause=said)
    assert isinstance(params, dict)
    return params


def limit(verb: Verb, params: ty.Mapping[str, ty.Any]) -> float:
    """Seconds that a verb may take unless the client says otherwise."""
    return verb.limit_s + float(params.get('timeout_s') or 0)
