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

"""Errors of the runtime: one class, told apart by a stable code.

An error has to cross two borders on its way to the user: the agent's socket
and Nova's RPC. Both keep only data, so everything that a person needs
(instance, step, cause, remedy) is a field and not hidden in a traceback.
"""

import errno
import re
import typing as ty

#: Of a disk, or of a quota, that has no room: ``no_space``.
FULL: ty.Final = (errno.ENOSPC, errno.EDQUOT)
_SURROGATE = re.compile('[\ud800-\udfff]')
#: Every code that may cross the agent's socket, and the HTTP status that the
#: agent answers with.
CODES: ty.Final[dict[str, int]] = {
    'aborted': 409,
    'agent_unavailable': 503,
    'bad_state': 409,
    'criu_failed': 500,
    'exists': 409,
    'file_refused': 422,
    'forbidden': 403,
    'image_is_disk': 422,
    'image_no_init': 422,
    'image_not_archive': 422,
    'image_too_large': 422,
    'image_too_many_entries': 422,
    'image_truncated': 422,
    'image_unsafe_entry': 422,
    'image_unsupported': 422,
    'image_wrong_arch': 422,
    'in_use': 409,
    'internal': 500,
    'invalid': 400,
    'keeper_unavailable': 503,
    'layer_in_use': 409,
    'layer_missing': 404,
    'lost': 500,
    'network': 500,
    'no_base_id': 507,
    'no_space': 507,
    'not_found': 404,
    'oci_failed': 500,
    'timeout': 504,
    'unsupported': 501,
    'volume_unusable': 422,
}


def printable(text: str) -> str:
    """A text with names of a guest's in it, for logs and databases.

    What is no UTF-8 in a name is a surrogate in Python's texts, which cannot
    be encoded.
    """
    return _SURROGATE.sub('\ufffd', text)


class ContainerError(Exception):
    """Something that the runtime could not do, and what to do about it.

    :param code: one of :data:`CODES`
    :param message: what failed, as a sentence without its full stop
    :param uuid: the instance, where one is concerned
    :param step: the step of a multi-step change that failed
    :param cause: the reason in the words of whoever gave it (kernel, OCI
        runtime, CRIU)
    :param remedy: what the reader can do
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        uuid: str | None = None,
        step: str | None = None,
        cause: str | None = None,
        remedy: str | None = None,
    ) -> None:
        if code not in CODES:
            raise ValueError(f'unknown error code {code!r}')
        self.code = code
        self.message = printable(message)
        self.uuid = uuid
        self.step = step
        self.cause = cause and printable(cause)
        self.remedy = remedy and printable(remedy)
        super().__init__(str(self))

    def __str__(self) -> str:
        text = self.message
        if self.uuid and self.uuid not in text:
            text = f'instance {self.uuid}: {text}'
        if self.step:
            text += f' (step {self.step})'
        if self.cause:
            text += f': {self.cause}'
        if self.remedy:
            text += f'. {self.remedy}'
        return text

    @classmethod
    def of(cls, error: BaseException, message: str,
           uuid: str | None = None) -> 'ContainerError':
        """An error as it is told to others.

        :param message: what failed, for one that nobody has foreseen
        """
        if isinstance(error, ContainerError):
            return error
        return cls('internal', message, uuid=uuid, cause=repr(error))

    def bare(self) -> 'ContainerError':
        """This error, for somebody who keeps it.

        The frames of a traceback have their variables: one that is kept by an
        object that they refer to lives, with all of them, until the collector
        of cycles comes by.
        """
        self.__traceback__ = self.__cause__ = self.__context__ = None
        return self

    def to_dict(self) -> dict[str, str | None]:
        return {
            'code': self.code,
            'message': self.message,
            'uuid': self.uuid,
            'step': self.step,
            'cause': self.cause,
            'remedy': self.remedy,
        }

    @classmethod
    def from_dict(cls, data: ty.Mapping[str, ty.Any]) -> 'ContainerError':
        """Rebuild an error that came over the socket.

        A code that this side does not know comes from a newer agent: it is
        kept as text and treated as ``internal``.
        """
        def text(name: str) -> str | None:
            value = data.get(name)
            return None if value is None else str(value)

        code = str(data.get('code'))
        message = str(data.get('message'))
        if code not in CODES:
            message = f'{message} ({code})'
            code = 'internal'
        target = AgentUnavailable if code == 'agent_unavailable' else cls
        return target(
            code,
            message,
            uuid=text('uuid'),
            step=text('step'),
            cause=text('cause'),
            remedy=text('remedy'),
        )


class AgentUnavailable(ContainerError):
    """The agent cannot be reached, so nothing is known of any container."""
