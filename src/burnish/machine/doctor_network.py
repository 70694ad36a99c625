"""Where models and data come from and where they are kept, as the environment says."""

from __future__ import annotations

import re
from collections.abc import Mapping

from burnish.machine.doctor_check import Check

PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
FOLDERS = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "HF_DATASETS_CACHE")


def hub(environment: Mapping[str, str]) -> list[Check]:
    endpoint = environment.get("HF_ENDPOINT")
    if not endpoint:
        return []
    if not endpoint.startswith(("https://", "http://")):
        return [
            Check(
                "HF_ENDPOINT",
                "problem",
                f"{endpoint} is not an address",
                "export HF_ENDPOINT=https://hf-mirror.com, or unset it",
            )
        ]
    if endpoint.rstrip("/") == "https://huggingface.co":
        return [Check("HF_ENDPOINT", "ok", endpoint, "")]
    return [
        Check(
            "HF_ENDPOINT",
            "warning",
            f"{endpoint}: models and data come from this mirror, and a token (HF_TOKEN) goes to it",
            "nothing to do if you trust it; unset HF_ENDPOINT for huggingface.co",
        )
    ]


def folders(environment: Mapping[str, str]) -> list[Check]:
    found: list[Check] = []
    for name in (n for n in FOLDERS if environment.get(n)):
        path = environment[name]
        if path.startswith("~"):
            # A shell expands ~ only at the start of an unquoted value. huggingface_hub 1 expands it itself in
            # HF_HOME and HF_HUB_CACHE; datasets does not in HF_DATASETS_CACHE, nor do most scripts.
            found.append(
                Check(
                    name,
                    "warning",
                    f"{path}: the shell did not expand ~, and some programs will make a folder called ~",
                    f'export {name}="$HOME{path[1:]}"',
                )
            )
        elif name == "TRANSFORMERS_CACHE":
            found.append(
                Check(
                    name,
                    "warning",
                    f"{path}: transformers 5 does not read it",
                    f"export HF_HOME={path} instead",
                )
            )
        else:
            found.append(Check(name, "ok", f"{path}: downloads are kept there", ""))
    return found


def offline(environment: Mapping[str, str]) -> list[Check]:
    on = [n for n in OFFLINE if environment.get(n, "").upper() in ("1", "ON", "YES", "TRUE")]
    if not on:
        return []
    return [
        Check(
            "offline",
            "warning",
            f"{', '.join(on)} set: nothing is downloaded, only what is there is used",
            f"unset {' '.join(on)} before a download",
        )
    ]


def proxies(environment: Mapping[str, str]) -> list[Check]:
    found: list[Check] = []
    for name in PROXIES:
        value = environment.get(name) or environment.get(name.lower())
        if value:
            shown = re.sub(r"//[^/@]*@", "//…@", value)  # never a password in a report
            found.append(
                Check(
                    name,
                    "warning",
                    f"{shown}: every download goes through it",
                    "nothing to do if downloads work; else unset it, or set NO_PROXY for your mirror",
                )
            )
    return found
