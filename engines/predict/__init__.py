"""Predictions for single images and for streams of files, by evaluation's own input path.

* `detector.Detector`: a checkpoint that predicts images in batches
* `detector.Prediction`: verdict, P(fake), generator and object of one image
* `predict.run_predict`: predict files into CSV, JSON lines or a table
* `explain.explain_images`: verdict, Grad-CAM map and a language model's text
"""
