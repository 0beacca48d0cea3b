"""Statements in a file that it is synthetic: the metadata mark, and C2PA content credentials (c2pa.org), signed.

Credentials need the extra `export3d-cli[c2pa]`. Without a certificate of the user a new one is made for each run.
Readers then report the statement as valid and its signer as not trusted: it shows that the file has not been changed
since, not who signed it.
"""

import datetime
import functools
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from export3d_cli import __version__
from export3d_cli.core.media.writer import SYNTHETIC_COMMENT
from export3d_cli.core.runtime.errors import InputError
from export3d_cli.core.runtime.files import check_file, write_atomic

SIGNED_SUFFIXES = (".avif", ".gif", ".heic", ".jpeg", ".jpg", ".m4v", ".mov", ".mp4", ".png", ".webp")
DIGITAL_SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
VALID_DAYS = 3650  # of a certificate made here
MAX_PEM_BYTES = 1 << 20
ALGORITHMS = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}  # of elliptic curves


@dataclass(frozen=True)
class Credentials:
    """Content credentials that were found in a file."""

    valid: bool  # whether signature and content agree
    trusted: bool  # whether the signer's certificate is known to the reader
    generator: str  # program that made the file
    synthetic: bool  # whether they state that a trained model made the content, or a part of it


def sign_file(path: Path, certificate: Path | None = None, key: Path | None = None) -> None:
    """Add signed content credentials to a file that this program made, in place.

    `certificate` is a PEM file with the signer's certificate and those of its issuers, None: a new, self-signed one;
    `key` its private key, PKCS #8 PEM without a password, elliptic curve or Ed25519. Raises `InputError` if the format
    is none of `SIGNED_SUFFIXES`, the file lacks this program's mark, the extra is missing, or the certificate cannot
    sign.
    """
    if path.suffix.lower() not in SIGNED_SUFFIXES:
        raise InputError(f"{path}: content credentials need one of {', '.join(SIGNED_SUFFIXES)}")
    if (certificate is None) != (key is None):
        raise InputError("a certificate and its private key must be given together")
    if not has_metadata_mark(path):
        raise InputError(f"{path} lacks the mark of this program: sign files that it has written, before other changes")
    try:
        import c2pa
        from cryptography.exceptions import UnsupportedAlgorithm
    except ImportError as error:
        raise InputError("content credentials need c2pa-python: pip install 'export3d-cli[c2pa]'") from error

    if certificate is None or key is None:
        chain, private_key = _make_certificate()
    else:
        for file in (certificate, key):
            check_file(file, MAX_PEM_BYTES)
        chain, private_key = certificate.read_bytes(), key.read_bytes()
    manifest = {
        "claim_generator_info": [{"name": "export3d", "version": __version__}],
        "title": path.name,
        "assertions": [{
            "label": "c2pa.actions.v2",
            "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": DIGITAL_SOURCE_TYPE}]},
        }],
    }  # fmt: skip
    try:
        info = c2pa.C2paSignerInfo(_signing_algorithm(private_key).encode(), chain, private_key, None)
        with (
            write_atomic(path) as temporary, c2pa.Signer.from_info(info) as signer, c2pa.Builder(manifest) as builder,
        ):  # fmt: skip
            builder.sign_file(path, temporary, signer)
            shutil.copymode(path, temporary)
    except (c2pa.C2paError, UnsupportedAlgorithm, ValueError, TypeError) as error:
        raise InputError(f"{path} cannot be signed: {error}") from error


def read_credentials(path: Path) -> Credentials | None:
    """Read the content credentials of a file; None without readable ones, for other formats, or without the extra.

    Makes no request to the addresses that a file names.
    """
    if path.suffix.lower() not in SIGNED_SUFFIXES:
        return None
    try:
        import c2pa
    except ImportError:
        return None
    offline = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}
    try:
        with c2pa.Context.from_dict(offline) as context, c2pa.Reader(path, context=context) as reader:
            state, store = reader.get_validation_state(), json.loads(reader.json())
        manifest = store["manifests"][store["active_manifest"]]
        generator = str(manifest["claim_generator_info"][0]["name"])
        assertions = {str(item["label"]): item["data"] for item in manifest["assertions"]}
        types = [
            str(action.get("digitalSourceType", ""))
            for label, data in assertions.items() if re.fullmatch(r"c2pa\.actions(\.v\d+)?", label)
            for action in data["actions"]
        ]  # fmt: skip
    except c2pa.C2paError:
        return None
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        return Credentials(valid=False, trusted=False, generator="", synthetic=False)
    return Credentials(valid=state in ("Valid", "Trusted"), trusted=state == "Trusted", generator=generator,
                       synthetic=any(name.lower().endswith("trainedalgorithmicmedia") for name in types))  # fmt: skip


def has_metadata_mark(path: Path) -> bool:
    """Return whether a file has the metadata mark, which every output format stores as plain text."""
    mark, tail = SYNTHETIC_COMMENT.encode(), b""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            if mark in tail + block:
                return True
            tail = block[-len(mark) :]
    return False


def _signing_algorithm(private_key: bytes) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = load_pem_private_key(private_key, None)
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in ALGORITHMS:
        return ALGORITHMS[key.curve.name]
    raise ValueError("the private key must be of an elliptic curve (P-256, P-384, P-521) or Ed25519")


@functools.cache
def _make_certificate() -> tuple[bytes, bytes]:
    """Return a certificate with its self-signed issuer, and the private key, PEM; as C2PA's profile demands."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = datetime.datetime.now(datetime.timezone.utc)
    issuer_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    organization = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "export3d")
    attributes = (x509.NameAttribute(NameOID.COMMON_NAME, f"export3d {name}") for name in ("self-signed", "user"))
    issuer, user = (x509.Name([organization, attribute]) for attribute in attributes)
    chain = b""
    for name, own_key, is_issuer in ((user, key, False), (issuer, issuer_key, True)):
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only",
             "decipher_only"), False,
        )  # fmt: skip
        builder = (
            x509.CertificateBuilder(issuer, name, own_key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
            .add_extension(x509.BasicConstraints(is_issuer, None), critical=True)
            .add_extension(
                x509.KeyUsage(digital_signature=not is_issuer, key_cert_sign=is_issuer, crl_sign=is_issuer, **usage),
                critical=True,
            )
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(own_key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        )  # fmt: skip
        if not is_issuer:
            email = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
            builder = builder.add_extension(email, critical=False)
        chain += builder.sign(issuer_key, hashes.SHA256()).public_bytes(Encoding.PEM)
    return chain, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
