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

"""The agent's errors in Nova's words.

oslo.messaging rebuilds an exception on the other side of an RPC only if its
class lives in ``nova.exception`` (``ALLOWED_EXMODS`` in nova.rpc), and the
compute manager decides by class between "try another host" and "give up".
So whatever leaves the driver is one of Nova's own classes.
"""

import contextlib

from nova import exception
from oslo_log import log as logging

from nova_pycontainer.runtime import errors

LOG = logging.getLogger(__name__)

#: Nova stores no more of a fault's message than this
#: (``nova.compute.utils.add_instance_fault_from_exc``).
_FAULT_LENGTH = 255

#: What Nova puts around the reason of an ImageUnacceptable that aborts a
#: build: "Build of instance <uuid> aborted: Image <uuid> is unacceptable: ".
_IMAGE_PREFIX = 124

#: "Build of instance <uuid> aborted: Failed to deploy instance: ".
_OTHER_PREFIX = 96

#: "Build of instance <uuid> aborted: Invalid input received: ".
_INPUT_PREFIX = 88

#: A shorter piece of a cause says nothing.
_MIN_CAUSE = 30

#: The image is at fault: another host would not help.
_IMAGE_CODES = frozenset(
    code for code in errors.CODES if code.startswith('image_'))

#: This host cannot, another one may.
_RESOURCE_CODES = frozenset(['no_space', 'no_base_id'])


def clip(text, length):
    """Shorten a text by what stands in its middle.

    The ends matter most: the beginning says what is wrong, the end of a path
    which file.
    """
    if len(text) <= length:
        return text
    tail = (length - 3) // 3
    head = length - 3 - tail
    return f'{text[:head]}...{text[-tail:] if tail else ""}'


def reason(error, room=_FAULT_LENGTH - _OTHER_PREFIX, step=True, without=''):
    """What happened and the remedy, in at most ``room`` characters.

    The instance is left out, because Nova names it; so is ``without``.
    """
    text = error.message.replace(without, '') if without else error.message
    if error.uuid:
        text = text.replace(f'instance {error.uuid}: ', '')
    if step and error.step:
        text += f' (step {error.step})'
    # A remedy that is cut is none: the others give way to it.
    remedy = f'. {error.remedy}' if error.remedy else ''
    cause = error.cause or ''
    if cause and cause not in text and (
            len(text) + len(remedy) + len(': ') +
            min(len(cause), _MIN_CAUSE) > room):
        # Where to read on is no remedy.
        remedy = f'. {error.remedy.partition(". ")[0]}' if remedy else ''
    remedy = clip(remedy, room - min(len(text), room // 3))
    text = clip(text, room - len(remedy))
    left = room - len(text) - len(remedy) - 2
    if cause and cause not in text and left >= min(len(cause), _MIN_CAUSE):
        text += f': {clip(cause, left)}'
    return text + remedy


def plug_failure(reason):
    """VirtualInterfacePlugException has no room for a reason by itself."""
    return exception.VirtualInterfacePlugException(
        f'{exception.VirtualInterfacePlugException.msg_fmt}: {reason}')


def attach_failure(instance):
    """InterfaceAttachFailed has no room for a reason by itself."""
    return _with_reason(exception.InterfaceAttachFailed, instance)


def detach_failure(instance):
    return _with_reason(exception.InterfaceDetachFailed, instance)


def _with_reason(kind, instance):
    text = kind.msg_fmt % {'instance_uuid': instance.uuid}
    return lambda reason: kind(f'{text}: {reason}')


def to_nova(error, *, image_id=None,
            failure=exception.InstanceDeployFailure):
    """Return the exception of Nova's that says the same.

    :param error: a :class:`nova_pycontainer.runtime.errors.ContainerError`
    :param image_id: the image that the server is made of, where an error may
        be the image's
    :param failure: class for everything that is nobody's fault in
        particular; it must take ``reason``
    """
    if isinstance(error, errors.AgentUnavailable):
        return exception.HypervisorUnavailable(reason(error))
    if error.code == 'not_found' and error.uuid:
        return exception.InstanceNotFound(instance_id=error.uuid)
    if error.code in _IMAGE_CODES and image_id:
        text = reason(error, _FAULT_LENGTH - _IMAGE_PREFIX, step=False,
                      without=f'image {image_id!r}: ')
        return exception.ImageUnacceptable(image_id=image_id, reason=text)
    if error.code in _RESOURCE_CODES:
        return exception.ComputeResourcesUnavailable(reason=reason(error))
    if error.code in ('file_refused', 'volume_unusable'):
        # The user's mistake, who is told; no other host would help.
        return exception.InvalidInput(
            reason=reason(error, _FAULT_LENGTH - _INPUT_PREFIX, step=False))
    if error.code == 'network':
        return plug_failure(reason(error))
    return failure(reason=reason(error))


@contextlib.contextmanager
def translated(instance=None, *, image_id=None,
               failure=exception.InstanceDeployFailure):
    """Let errors of the agent leave the body as exceptions of Nova's.

    The whole error goes to the log, for what Nova keeps of it is short.
    """
    try:
        yield
    except errors.ContainerError as e:
        if not isinstance(e, errors.AgentUnavailable) and (
                e.code != 'not_found'):
            LOG.error('%s', e, instance=instance)
        raise to_nova(e, image_id=image_id, failure=failure) from e


@contextlib.contextmanager
def rolled_back(instance, failure):
    """As :func:`translated`, for what fails without a change of the server.

    Nova then leaves the server in the state that it was in, instead of
    ERROR. Not where the agent may be at work still.
    """
    try:
        yield
    except errors.ContainerError as e:
        error = to_nova(e, image_id=instance.image_ref, failure=failure)
        LOG.error('%s', e, instance=instance)
        if isinstance(e, errors.AgentUnavailable) or e.code == 'timeout':
            raise error from e
        raise exception.InstanceFaultRollback(error) from e
    except (exception.HypervisorUnavailable,
            exception.InstanceFaultRollback):
        raise
    except exception.NovaException as e:
        # Of a port or a volume.
        raise exception.InstanceFaultRollback(e) from e


@contextlib.contextmanager
def after_the_move(instance):
    """What cannot be cleaned up on the source is only told.

    The server runs elsewhere; the manager would not finish that, and put it
    into ERROR. :meth:`.resize.Resizer.forget` tries again.
    """
    try:
        yield
    except (errors.ContainerError, exception.NovaException) as e:
        LOG.error('It has moved, and cannot be cleaned up here: %s', e,
                  instance=instance)


def unavailable(error):
    """The exception that makes Nova's periodic tasks skip this turn.

    Only for those entry points where the manager expects it; everything else
    raises HypervisorUnavailable.
    """
    return exception.VirtDriverNotReady(reason(error))
