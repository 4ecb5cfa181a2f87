"""The home page is README.md, whose links start at the repository: let them start at the site."""

import re


def on_page_content(html: str, **_: object) -> str:
    """Point ``docs/images/x.png`` to ``images/x.png`` and ``docs/x.md`` to ``x/``."""
    html = html.replace('src="docs/', 'src="')
    return re.sub(r'href="docs/([\w-]+)\.md"', r'href="\1/"', html)
