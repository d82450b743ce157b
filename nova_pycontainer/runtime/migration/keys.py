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

"""Who a host is, and how it knows the other one.

Each host makes its own key and self-signed certificate at its first start.
The certificate (not only its fingerprint: OpenSSL can only pin what it has)
travels with the compute node's record, so the cloud's own database is the
directory of keys. An operator's CA replaces this where one is configured.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import ipaddress
import os
import pathlib
import ssl
import stat
import tempfile
import typing as ty

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization
from cryptography import x509
from cryptography.x509 import oid

from nova_pycontainer.runtime import errors
from nova_pycontainer.runtime import state

#: Key and certificate in one file: no crash can leave a pair that differs.
FILE: ty.Final = 'host.pem'
VALIDITY: ty.Final = datetime.timedelta(days=20 * 365)
#: The other host's clock may be behind.
_SKEW: ty.Final = datetime.timedelta(days=1)
#: A certificate that is announced, or a key file, is never larger.
_MAX_PEM: ty.Final = 64 << 10


def _invalid(message: str, cause: object = None,
             remedy: str | None = None) -> errors.ContainerError:
    return errors.ContainerError(
        'invalid', message, cause=None if cause is None else str(cause),
        remedy=remedy)


def parse(pem: str) -> x509.Certificate:
    """Read one certificate.

    :raises ContainerError: ``invalid``: it is none, or there are several
    """
    try:
        if len(pem) > _MAX_PEM:
            raise ValueError('it is too large')
        found = x509.load_pem_x509_certificates(pem.encode('ascii'))
        if len(found) != 1:
            raise ValueError(f'there are {len(found)} certificates')
    except (AttributeError, TypeError, ValueError) as e:
        raise _invalid('the certificate of a host cannot be read', e) from e
    return found[0]


def fingerprint(der: bytes) -> str:
    """SHA-256 of a certificate, in hexadecimal digits."""
    return hashlib.sha256(der).hexdigest()


def der(pem: str) -> bytes:
    """One certificate in its other form."""
    return _der(parse(pem))


def _der(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.DER)


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(
        serialization.Encoding.PEM).decode('ascii')


def _names(certificate: x509.Certificate) -> set[str]:
    try:
        names = certificate.extensions.get_extension_for_class(
            x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    return ({_canonical(n) for n in names.get_values_for_type(x509.DNSName)}
            | {str(n) for n in names.get_values_for_type(x509.IPAddress)})


def _canonical(name: str) -> str:
    """One spelling for a host's name or address."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.rstrip('.').lower()


@dataclasses.dataclass(frozen=True)
class Peer:
    """What has been announced of the other host.

    :ivar certificate: its certificate as PEM; only with an operator's CA may
        it be missing
    :ivar names: its host name and addresses: with an operator's CA, one of
        them must be in its certificate (as a subject alternative name, in
        full: wildcards and common names do not count)
    """

    certificate: str | None = None
    names: tuple[str, ...] = ()

    def pin(self) -> bytes | None:
        """The announced certificate as DER."""
        return None if self.certificate is None else _der(
            parse(self.certificate))


@dataclasses.dataclass(frozen=True)
class Identity:
    """A host's key and certificate.

    They are held in memory: a rotation meanwhile cannot mix old and new.
    """

    #: What the other hosts have to know, PEM.
    certificate: str
    #: Private key, then certificate and what leads from it to the CA.
    _chain: bytes = dataclasses.field(repr=False)
    #: The operator's CA, PEM; None: peers are pinned.
    ca: str | None = None
    _directory: pathlib.Path | None = None
    _hostname: str = ''

    @classmethod
    def load_or_create(
        cls, directory: str | os.PathLike[str], hostname: str
    ) -> 'Identity':
        """Read the host's own key and certificate; make them if needed.

        :param directory: made with mode 0700
        :raises ContainerError: ``forbidden``: others can reach the key;
            ``invalid``: damaged, expired, or no such name is possible
        """
        path = pathlib.Path(directory)
        file = path / FILE
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_directory(path)
            try:
                data = _read_key(file)
            except FileNotFoundError:
                _store_first(path, _create(hostname))
                data = _read_key(file)
        except OSError as e:
            raise _invalid(f'the host\'s key in {path} cannot be read', e
                           ) from e
        return cls(_leaf(data, file, 'Delete it to have a new one made'),
                   data, _directory=path, _hostname=hostname)

    @classmethod
    def load_operator(
        cls, ca: str | os.PathLike[str], cert: str | os.PathLike[str],
        key: str | os.PathLike[str],
    ) -> 'Identity':
        """Read what an operator's own CA has issued.

        :param ca: certificates of the CA; every host must have the same
        :param cert: the host's certificate, for use as server and client
            alike, and the intermediate ones after it
        :raises ContainerError: ``forbidden``: others can reach the key;
            ``invalid``: missing or unusable
        """
        try:
            anchors = _read(pathlib.Path(ca))
            chain = _read(pathlib.Path(cert))
            secret = _read_key(pathlib.Path(key), group=True)
            x509.load_pem_x509_certificates(anchors)
        except (OSError, ValueError) as e:
            raise _invalid(
                'the certificates for migrations cannot be read', e,
                'Check the options for the CA, certificate and key') from e
        remedy = 'Have the CA issue one for server and client authentication'
        data = secret.rstrip(b'\n') + b'\n' + chain
        leaf = _leaf(data, pathlib.Path(cert), remedy)
        if not _names(parse(leaf)):
            raise _invalid(f'{cert} has no subject alternative name', None,
                           'Have the CA issue one with the host\'s name or '
                           'address')
        identity = cls(leaf, data, ca=anchors.decode('ascii'))
        identity._try(remedy)
        return identity

    def _try(self, remedy: str) -> None:
        """Talk to itself: whatever TLS dislikes is known at once."""
        server, client = ssl.MemoryBIO(), ssl.MemoryBIO()
        sides = [
            self.context([], server=True).wrap_bio(
                server, client, server_side=True),
            self.context([], server=False).wrap_bio(client, server)]
        try:
            # Hello; hello and certificate; certificate; its verification.
            for side in reversed(sides * 2):
                with contextlib.suppress(ssl.SSLWantReadError):
                    side.do_handshake()
        except ssl.SSLError as e:
            reason = getattr(e, 'verify_message', None) or e.reason or e
            raise _invalid('the certificate for migrations would be refused '
                           'by the other hosts', reason, remedy) from e

    def rotate(self) -> 'Identity':
        """Make a new key and certificate.

        What was announced before is of no use any more: connections that
        are open stay so, the next one needs the new announcement.

        :raises ContainerError: ``unsupported`` for an operator's
        """
        if self._directory is None:
            raise errors.ContainerError(
                'unsupported',
                'a certificate of an operator\'s CA is not made here',
                remedy='Replace the files, then restart the agent')
        _check_directory(self._directory)
        temporary = _write(self._directory, _create(self._hostname))
        os.rename(temporary, self._directory / FILE)
        state.fsync_dir(self._directory)
        return self.load_or_create(self._directory, self._hostname)

    def fingerprint(self) -> str:
        """SHA-256 of the certificate, in hexadecimal digits."""
        return fingerprint(_der(parse(self.certificate)))

    def context(
        self, peers: ty.Iterable[Peer], *, server: bool
    ) -> ssl.SSLContext:
        """TLS 1.3, both sides authenticated, nobody trusted but ``peers``.

        This is the first half of the check; :meth:`check` is the second.
        """
        context = ssl.SSLContext(
            ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        # By check() instead: one of several names, in both directions.
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        # Python's default; it would hide that somebody cut a connection.
        context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
        if server:
            # Nobody resumes; and a ticket that the other side never reads
            # would turn our close into a reset.
            context.num_tickets = 0
        _load_chain(context, self._chain)
        if self.ca is not None:
            context.load_verify_locations(cadata=self.ca)
            return context
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        # A dict: OpenSSL refuses the same certificate twice.
        pins = {pin: None for p in peers if (pin := p.pin()) is not None}
        for pin in pins:
            context.load_verify_locations(cadata=pin)
        return context

    def check(self, der: bytes | None, peer: Peer) -> str | None:
        """Is it the certificate of this peer?

        :param der: the certificate with which a handshake has succeeded
        :returns: what is wrong, or None
        """
        if not der:
            return 'it has no certificate'
        pin = peer.pin()
        if pin is None and self.ca is None:
            return 'no certificate of it was announced'
        if pin is not None and pin != der:
            return (f'its certificate {fingerprint(der)} is not the '
                    f'announced {fingerprint(pin)}')
        if self.ca is not None:
            names = _names(x509.load_der_x509_certificate(der))
            if names.isdisjoint(map(_canonical, peer.names)):
                return (f'its certificate is for {sorted(names)}, not for '
                        f'{list(peer.names)}')
        return None


def _load_chain(context: ssl.SSLContext, chain: bytes) -> None:
    """Load a key from memory: the ssl module only takes files."""
    fd = os.memfd_create('key')
    try:
        with os.fdopen(os.dup(fd), 'wb') as f:
            f.write(chain)
        # A password, lest OpenSSL asks for one on the terminal.
        context.load_cert_chain(f'/proc/self/fd/{fd}', password='')
    finally:
        os.close(fd)


def _leaf(data: bytes, file: pathlib.Path, remedy: str) -> str:
    """The first certificate, if it can be used now."""
    try:
        _load_chain(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), data)
        leaf = x509.load_pem_x509_certificates(data)[0]
    except (OSError, ValueError, IndexError) as e:
        raise _invalid(f'{file} is damaged, or key and certificate are not a '
                       'pair', e, remedy) from e
    now = datetime.datetime.now(datetime.UTC)
    if not leaf.not_valid_before_utc <= now <= leaf.not_valid_after_utc:
        raise _invalid(
            f'the certificate in {file} is valid from '
            f'{leaf.not_valid_before_utc} to {leaf.not_valid_after_utc}',
            remedy=f'Is the clock right? {remedy}')
    return _pem(leaf)


def _create(hostname: str) -> bytes:
    """A new key and its certificate."""
    try:
        name: x509.GeneralName = x509.IPAddress(
            ipaddress.ip_address(hostname))
    except ValueError:
        try:
            name = x509.DNSName(hostname)
            # 64: the upper bound of a common name (RFC 5280, appendix A).
            subject = x509.Name([x509.NameAttribute(
                oid.NameOID.COMMON_NAME, hostname[:64])])
        except ValueError as e:
            raise _invalid(f'a certificate cannot be made for {hostname!r}',
                           e, 'Set the host\'s name') from e
    else:
        subject = x509.Name([x509.NameAttribute(
            oid.NameOID.COMMON_NAME, hostname)])
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + VALIDITY)
        .add_extension(x509.SubjectAlternativeName([name]), critical=False)
        # It must not vouch for others, not even with those who pin it.
        .add_extension(x509.BasicConstraints(ca=False, path_length=None),
                       critical=True)
        .add_extension(x509.KeyUsage(
            digital_signature=True, content_commitment=False,
            key_encipherment=False, data_encipherment=False,
            key_agreement=False, key_cert_sign=False, crl_sign=False,
            encipher_only=False, decipher_only=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([
            oid.ExtendedKeyUsageOID.SERVER_AUTH,
            oid.ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256()))
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption()) + _pem(certificate).encode('ascii')


def _store_first(directory: pathlib.Path, data: bytes) -> None:
    """Write the key, unless another process was faster."""
    temporary = _write(directory, data)
    try:
        # Unlike a rename this does not replace what is there.
        os.link(temporary, directory / FILE)
    except FileExistsError:
        pass
    finally:
        os.unlink(temporary)
    state.fsync_dir(directory)


def _write(directory: pathlib.Path, data: bytes) -> str:
    """Write to a new file, mode 0600; return its path."""
    fd, name = tempfile.mkstemp(dir=directory, prefix=f'.{FILE}.')
    try:
        with os.fdopen(fd, 'wb') as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
    except BaseException:
        os.unlink(name)
        raise
    return name


def _read(file: pathlib.Path) -> bytes:
    with open(file, 'rb') as f:
        data = f.read(_MAX_PEM + 1)
    if len(data) > _MAX_PEM:
        raise _invalid(f'{file} is too large')
    return data


def _read_key(file: pathlib.Path, group: bool = False) -> bytes:
    """Read a key that no other user can reach.

    :param group: its group may read it
    """
    # Checked is what is read: the same descriptor.
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
                 | (0 if group else os.O_NOFOLLOW))
    with os.fdopen(fd, 'rb') as f:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            raise _invalid(f'{file} is not a file')
        _check_private(file, info, 0o027 if group else 0o077)
        data = f.read(_MAX_PEM + 1)
    if len(data) > _MAX_PEM:
        raise _invalid(f'{file} is too large')
    return data


def _check_directory(path: pathlib.Path) -> None:
    info = os.lstat(path)
    if not stat.S_ISDIR(info.st_mode):
        raise _invalid(f'{path} is not a directory')
    _check_private(path, info, 0o077)


def _check_private(path: pathlib.Path, info: os.stat_result,
                   forbidden: int) -> None:
    if info.st_uid not in (0, os.geteuid()):
        raise errors.ContainerError(
            'forbidden', f'{path} belongs to user {info.st_uid}',
            remedy='A key that others have had is no key: delete it, or '
                   'change the owner')
    if info.st_mode & forbidden:
        raise errors.ContainerError(
            'forbidden',
            f'{path} has mode {stat.S_IMODE(info.st_mode):04o}: others can '
            'reach the host\'s key',
            remedy='If nobody has read it: '
                   f'chmod {"go=" if forbidden & 0o040 else "o=,g-w"} {path}')
