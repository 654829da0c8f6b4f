"""`zellige demo`: a page in the browser on which a model is tried. Gradio stands in page.py, widgets.py and the files
of tabs alone; what they show is made by functions beside them."""
