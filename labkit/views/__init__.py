"""Views: render() turns a snapshot into pictures, tables and text; a widget only carries them."""
