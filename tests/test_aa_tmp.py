def test_page(page):
    page.goto("data:text/html,<h1>hi</h1>")
