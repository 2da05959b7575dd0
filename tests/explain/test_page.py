"""One page, without other files."""

from moellava.explain import KINDS, write_page


def test_the_page_needs_no_other_file(explanation, tmp_path):
    page = write_page(explanation, tmp_path / "out")
    text = page.read_text()
    written = {path.stem for path in page.parent.glob("*.png")}
    assert written == {*KINDS, "tokens", "heads", "load", "pathways"}
    assert text.count("data:image/png;base64,") == len(written)
    assert 'src="http' not in text
    assert "href" not in text
    assert explanation.answer in text


def test_a_page_escapes_what_was_asked(explanation, tmp_path):
    from dataclasses import replace

    odd = replace(explanation, question="Is a < b? <script>alert(1)</script> $answer")
    text = write_page(odd, tmp_path).read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; $answer" in text
