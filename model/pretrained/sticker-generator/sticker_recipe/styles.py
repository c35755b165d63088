"""The icon sets of the recipe: one npm package per style, and the styles that are never trained on.

The versions are pinned and the licences are compared with those in the packages. The set of a style may be part of a
package of many sets. Sets that are mono-coloured as a whole are not in the table, nor are sets with copies of other
emoji, such as UnJS Logos.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Package:
    """An npm package.

    Attributes:
        name: Name in the npm registry.
        version: Pinned version.
        license: SPDX identifier, compared with that in the package.
        icon: Regular expression for the keys of the icons to use. Its group is the ``name``, the ``country`` or the
            ``code`` (code points of an emoji) of an icon.
        caption: Format of the name as a caption, so that the logo of a company has another caption than an apple.
        files: Regular expression for the paths of the images, of which the keys are the file names; None for a set in
            Iconify's format.
        member: Path of the set in a package of many Iconify sets; None for a package of one set.
        filtered: Leave out images without colour, wide images and copies of an earlier image.
    """

    name: str
    version: str
    license: str
    icon: str = r"(?P<name>.+)"
    caption: str = "{}"
    files: str | None = None
    member: str | None = None
    filtered: bool = False

    @property
    def tarball(self) -> str:
        """The file name of the tarball of ``npm pack``."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def _more(name: str, version: str, license: str, icon: str = r"(?P<name>.+)", caption: str = "{}") -> Package:  # noqa: A002
    """Return a package with one Iconify set, of which unsuitable images are left out."""
    return Package(f"@iconify-json/{name}", version, license, icon, caption, filtered=True)


def _member(name: str, license: str, icon: str = r"(?P<name>.+)", caption: str = "{}") -> Package:  # noqa: A002
    """Return one set of the package of all Iconify sets, for sets without a package of their own."""
    return Package("@iconify/json", "2.2.535", license, icon, caption, member=f"json/{name}.json", filtered=True)


def _files(name: str, version: str, license: str, files: str, icon: str, caption: str) -> Package:  # noqa: A002
    """Return a package of SVG files, of which unsuitable images are left out."""
    return Package(name, version, license, icon, caption, files, filtered=True)


COUNTRY = r"(?P<country>[a-z]{2})"
DRAWN_LARGER = r"(?P<name>.+)-(?:24|32|48)"  # the same icons at 16, 20 and 28 px have less detail
FILLED_TOO = r"(?P<name>.+?)(?:-fill)?"
NUMBERED = r"(?P<name>.+?)(?:-\d+)?"
NUMBERED_VARIANT = r"(?P<name>.+?)(?:-\d+)?(?:-flat|-duo)?"
NUMBERED_BY_WORD = r"(?P<name>.+?)(?:-(?:one|two|three|four))?"
UNTHEMED_TYPE = r"(?!(?:file|folder)-type-light-)(?:(?:file|folder)-type-)?(?P<name>.+?)(?:-opened)?"
ONE_THEME = r"(?P<name>.+)(?<!-dark)(?<!-light)"  # not the variants for dark and light backgrounds
NAMES = Package("emojibase-data", "17.0.0", "MIT")
BUNDLED = {
    "circle-flags": Package("@iconify-json/circle-flags", "1.2.11", "MIT", COUNTRY),
    "emojione-v1": Package("@iconify-json/emojione-v1", "1.2.3", "CC-BY-SA-4.0"),
    "flag": Package("@iconify-json/flag", "1.2.12", "MIT", COUNTRY + "-4x3"),
    "flagpack": Package("@iconify-json/flagpack", "1.2.8", "MIT", COUNTRY),
    "flat-color-icons": Package("@iconify-json/flat-color-icons", "1.2.3", "MIT"),
    "fluent-3d": Package("@lobehub/fluent-emoji-3d", "1.1.0", "MIT", r"(?P<code>[0-9a-f-]+)", files=r"assets/.+\.webp"),
    "fluent-color": Package("@iconify-json/fluent-color", "1.2.21", "MIT", DRAWN_LARGER),
    "fluent-emoji": Package("@iconify-json/fluent-emoji", "1.2.7", "MIT"),
    "fluent-emoji-flat": Package("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"),
    "fxemoji": Package("@iconify-json/fxemoji", "1.2.2", "Apache-2.0"),
    "meteocons": Package("@iconify-json/meteocons", "1.2.4", "MIT", FILLED_TOO),
    "noto": Package("@iconify-json/noto", "1.2.9", "Apache-2.0"),
    "noto-v1": Package("@iconify-json/noto-v1", "1.2.5", "Apache-2.0"),
    "openmoji": Package("@iconify-json/openmoji", "1.2.29", "CC-BY-SA-4.0"),
    "streamline-emojis": Package("@iconify-json/streamline-emojis", "1.2.4", "CC-BY-4.0", NUMBERED),
    "streamline-freehand-color": Package("@iconify-json/streamline-freehand-color", "1.2.2", "CC-BY-4.0", NUMBERED),
    "streamline-ultimate-color": Package("@iconify-json/streamline-ultimate-color", "1.2.2", "CC-BY-4.0", NUMBERED),
    "twemoji": Package("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0"),
}
"""The styles that the bundled generator was trained on or compared with."""
FURTHER = {
    "emojione": Package("@iconify-json/emojione", "1.2.3", "CC-BY-4.0"),
    # Objects, symbols and scenes.
    "flat-ui": _more("flat-ui", "1.2.3", "MIT"),
    "glyphs-poly": _member("glyphs-poly", "MIT", NUMBERED),
    "icon-park": _more("icon-park", "1.2.4", "Apache-2.0", NUMBERED_BY_WORD),
    "marketeq": _more("marketeq", "1.2.2", "MIT", NUMBERED),
    "streamline-color": _more("streamline-color", "1.2.2", "CC-BY-4.0", NUMBERED_VARIANT),
    "streamline-cyber-color": _more("streamline-cyber-color", "1.2.2", "CC-BY-4.0", NUMBERED),
    "streamline-flex-color": _more("streamline-flex-color", "1.2.2", "CC-BY-4.0", NUMBERED_VARIANT),
    "streamline-kameleon-color": _more("streamline-kameleon-color", "1.2.2", "CC-BY-4.0", NUMBERED_VARIANT),
    "streamline-plump-color": _more("streamline-plump-color", "1.2.2", "CC-BY-4.0", NUMBERED_VARIANT),
    "streamline-sharp-color": _more("streamline-sharp-color", "1.2.2", "CC-BY-4.0", NUMBERED_VARIANT),
    "streamline-stickies-color": _more("streamline-stickies-color", "1.2.2", "CC-BY-4.0", NUMBERED_VARIANT),
    "streetmix": _files(
        "@streetmix/illustrations", "2.1.1", "CC-BY-SA-4.0", r"images/(?!ground|markings|sky|thumbnails)\w+/.+\.svg",
        NUMBERED, "{}",
    ),
    # Flags and traffic signs.
    "cif": _more("cif", "1.2.7", "CC0-1.0", COUNTRY),
    "mapillary-signs": _files(
        "@rapideditor/mapillary_sprite_source", "1.8.0", "MIT", r"package_signs/.+\.svg",
        r"[a-z]+--(?P<name>.+?)(?:--g\d+)?", "{} sign",
    ),
    # Types of files and folders.
    "atom-material-icons": _files(
        "atom-material-icons", "3.0.0", "MIT", r"public/icons/files/.+\.svg", r"(?P<name>.+)", "{} icon"
    ),
    "catppuccin": _more("catppuccin", "1.2.17", "MIT", r"(?P<name>.+?)(?:-open)?", "{} icon"),
    **{
        f"file-icon-{form}": _files(
            "file-icon-vectors", "1.0.0", "MIT", rf"dist/icons/{form}/.+\.svg", r"(?P<name>.+)", "{} icon"
        )
        for form in ("classic", "square-o", "vivid")
    },
    "material-icon-theme": _more(
        "material-icon-theme", "1.2.70", "MIT", r"(?P<name>.+?)(?:-open)?(?<!-light)", "{} icon"
    ),
    "vscode-icons": _more(
        "vscode-icons", "1.2.97", "MIT", UNTHEMED_TYPE, "{} icon"
    ),
    # Logos. The licence covers the drawing; most logos are trademarks of their owners.
    "cryptocurrency-color": _more("cryptocurrency-color", "1.2.4", "CC0-1.0", caption="{} logo"),
    "devicon": _more("devicon", "1.2.68", "MIT", r"(?P<name>.+)(?<!-wordmark)", "{} logo"),
    "gcp": _member("gcp", "Apache-2.0", caption="{} logo"),
    "k8s": _member("k8s", "Apache-2.0", caption="kubernetes {}"),
    "lobehub-icons": _files(
        "@lobehub/icons-static-svg", "1.95.1", "MIT", r"icons/.+\.svg", r"(?P<name>.+)-color", "{} logo"
    ),
    "logos": _more("logos", "1.2.19", "CC0-1.0", r"(?P<name>.+?)(?:-icon)?", "{} logo"),
    "selfhst": _member("selfhst", "CC-BY-4.0", ONE_THEME, "{} logo"),
    "skill-icons": _more("skill-icons", "1.2.4", "MIT", r"(?P<name>.+?)(?:-dark|-light)?", "{} logo"),
    "super-tiny-icons": _files(
        "super-tiny-icons", "0.6.0", "MIT", r"images/svg/.+\.svg", r"(?P<name>.+)", "{} logo"
    ),
    "thesvg-color": _member("thesvg-color", "MIT", caption="{} logo"),
    "token-branded": _more("token-branded", "1.2.45", "MIT", caption="{} logo"),
}  # fmt: skip
"""Styles that are prepared for the next training, and a further unseen one."""
STYLES = BUNDLED | FURTHER
UNSEEN = frozenset({"emojione", "openmoji", "twemoji"})
"""Styles that are never trained on, so that they measure how a generator or an encoder does on a new domain."""
_UNSEEN_FAMILY = re.compile(r"twemoji|twitter|openmoji|emojione(?!-v1)|emojitwo|joypixels|openclipart")


def training_styles(names: list[str]) -> list[str]:
    """Return the names of the styles to train on: all except the unseen ones.

    Raises:
        ValueError: A style is another edition of an unseen one.
    """
    chosen = [name for name in names if name not in UNSEEN]
    if editions := [name for name in chosen if _UNSEEN_FAMILY.search(name.lower())]:
        raise ValueError(
            f"styles are editions of unseen ones: {', '.join(editions)}; remove their files, and train on none of them"
        )
    return chosen
