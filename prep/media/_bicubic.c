/* Bicubic resizing of RGB images to planes. It computes what Pillow's resize computes, so it is equal to the bit.

   Pillow (src/libImaging/Resample.c, versions 12 and 13) resizes in two passes, across and then down the image. Each
   rounds to 8 bits. A weight is a double, rounded to 22 fractional bits. An output is the sum of 8-bit inputs times
   weights in int32, plus one half, shifted right by 22 bits and clipped to 0..255.

   Integer sums do not depend on their order, so the same numbers can be computed 32 at a time. Down the image, 32
   neighbours of a row share their weights. Across, 32 rows do: a band of 32 rows is transposed first, so that the bytes
   of a column are neighbours, and its result is transposed back. */

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define FRACTION_BITS 22
#define CHANNELS 3
#define LANES 32 /* outputs that are computed together */
#define BLOCK 16 /* side of the blocks in which bytes are transposed */

#if defined(__x86_64__) && defined(__GLIBC__)
/* The loader chooses what the processor has. */
#define VECTORIZED __attribute__((target_clones("avx2", "default")))
#else
#define VECTORIZED
#endif
#define INLINE static inline __attribute__((always_inline))

/* Which inputs make each output of a pass, and their weights. */
typedef struct {
    Py_ssize_t num_outputs, max_inputs;
    Py_ssize_t *first; /* first input of every output */
    Py_ssize_t *count; /* inputs of every output */
    int32_t *weights;  /* max_inputs for every output */
} Pass;

static double
bicubic(double x) {
    x = fabs(x);
    if (x < 1.0) {
        return (1.5 * x - 2.5) * x * x + 1;
    }
    return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0.0;
}

static void
free_pass(Pass *pass) {
    free(pass->first);
    free(pass->count);
    free(pass->weights);
}

/* Returns 0, or -1 if memory ran out. Free the pass in both cases. */
static int
make_pass(Pass *pass, Py_ssize_t num_inputs, Py_ssize_t num_outputs) {
    double scale = (double)num_inputs / (double)num_outputs;
    double stretch = scale < 1.0 ? 1.0 : scale, shrink = 1.0 / stretch, support = 2.0 * stretch;
    Py_ssize_t max_inputs = (Py_ssize_t)ceil(support) * 2 + 1;
    double *exact = malloc(max_inputs * sizeof(double));
    *pass = (Pass){num_outputs, max_inputs, malloc(num_outputs * sizeof(Py_ssize_t)),
                   malloc(num_outputs * sizeof(Py_ssize_t)), malloc(num_outputs * max_inputs * sizeof(int32_t))};
    if (!exact || !pass->first || !pass->count || !pass->weights) {
        free(exact);
        return -1;
    }
    for (Py_ssize_t output = 0; output < num_outputs; output++) {
        int32_t *weights = pass->weights + output * max_inputs;
        double center = (output + 0.5) * scale, sum = 0.0;
        Py_ssize_t first = (Py_ssize_t)(center - support + 0.5), end = (Py_ssize_t)(center + support + 0.5);
        first = first < 0 ? 0 : first;
        end = end > num_inputs ? num_inputs : end;
        for (Py_ssize_t input = first; input < end; input++) {
            exact[input - first] = bicubic((input - center + 0.5) * shrink);
            sum += exact[input - first];
        }
        for (Py_ssize_t index = 0; index < end - first; index++) {
            double weight = (sum != 0.0 ? exact[index] / sum : exact[index]) * (1 << FRACTION_BITS);
            weights[index] = (int32_t)(weight < 0 ? weight - 0.5 : weight + 0.5);
        }
        pass->first[output] = first;
        pass->count[output] = end - first;
    }
    free(exact);
    return 0;
}

/* 32 outputs: sums of `count` inputs, `step` bytes apart, times their weights. */
INLINE void
weigh(const uint8_t *inputs, Py_ssize_t step, const int32_t *weights, Py_ssize_t count, uint8_t *outputs) {
    int32_t sums[LANES];
    for (int lane = 0; lane < LANES; lane++) {
        sums[lane] = 1 << (FRACTION_BITS - 1);
    }
    for (Py_ssize_t index = 0; index < count; index++, inputs += step) {
        for (int lane = 0; lane < LANES; lane++) {
            sums[lane] += inputs[lane] * weights[index];
        }
    }
    for (int lane = 0; lane < LANES; lane++) {
        int32_t value = sums[lane] >> FRACTION_BITS;
        value = value < 0 ? 0 : value;
        outputs[lane] = value > 255 ? 255 : value;
    }
}

/* A perfect shuffle: the first half of a block and its second half, byte by byte in turns. */
INLINE void
shuffle(const uint8_t *restrict block, uint8_t *restrict mixed) {
    for (int index = 0; index < BLOCK * BLOCK / 2; index++) {
        mixed[2 * index] = block[index];
        mixed[2 * index + 1] = block[index + BLOCK * BLOCK / 2];
    }
}

/* 16 rows of 16 bytes become 16 columns. Each shuffle rotates the bits of a byte's index by one, so that after four,
   row and column have changed places. */
INLINE void
transpose(uint8_t *block) {
    uint8_t mixed[BLOCK * BLOCK];
    for (int twice = 0; twice < 2; twice++) {
        shuffle(block, mixed);
        shuffle(mixed, block);
    }
}

/* The first `size` bytes at `from`, at most 16, to `to`. Constant sizes are single instructions. */
INLINE void
copy(void *to, const void *from, Py_ssize_t size) {
    if (size >= BLOCK) {
        memcpy(to, from, BLOCK);
    } else {
        memcpy(to, from, size);
    }
}

/* The pass across: rows of pixels of 3 or 4 bytes, to 3 planes of rows with as many bytes as the pass has outputs.
   `columns` and `outputs` are scratch: 32 bytes for every byte of a source row, and of a row of a plane, both padded
   to whole blocks. */
VECTORIZED static void
across(const uint8_t *source, Py_ssize_t height, Py_ssize_t width, Py_ssize_t pixel_bytes, const Pass *pass,
       uint8_t *columns, uint8_t *outputs, uint8_t *planes) {
    Py_ssize_t row_bytes = width * pixel_bytes;
    uint8_t block[BLOCK * BLOCK] = {0};
    for (Py_ssize_t top = 0; top < height; top += LANES) {
        for (Py_ssize_t side = 0; side < LANES; side += BLOCK) {
            for (Py_ssize_t byte = 0; byte < row_bytes; byte += BLOCK) {
                for (Py_ssize_t row = 0; row < BLOCK; row++) {
                    /* The last band is filled up with copies of the last row. */
                    Py_ssize_t from = top + side + row < height ? top + side + row : height - 1;
                    copy(block + row * BLOCK, source + from * row_bytes + byte, row_bytes - byte);
                }
                transpose(block);
                for (Py_ssize_t column = 0; column < BLOCK; column++) {
                    memcpy(columns + (byte + column) * LANES + side, block + column * BLOCK, BLOCK);
                }
            }
        }
        for (Py_ssize_t channel = 0; channel < CHANNELS; channel++) {
            for (Py_ssize_t output = 0; output < pass->num_outputs; output++) {
                weigh(columns + (pass->first[output] * pixel_bytes + channel) * LANES, pixel_bytes * LANES,
                      pass->weights + output * pass->max_inputs, pass->count[output], outputs + output * LANES);
            }
            for (Py_ssize_t side = 0; side < LANES && top + side < height; side += BLOCK) {
                for (Py_ssize_t output = 0; output < pass->num_outputs; output += BLOCK) {
                    for (Py_ssize_t column = 0; column < BLOCK; column++) {
                        memcpy(block + column * BLOCK, outputs + (output + column) * LANES + side, BLOCK);
                    }
                    transpose(block);
                    for (Py_ssize_t row = 0; row < BLOCK && top + side + row < height; row++) {
                        uint8_t *to = planes + (channel * height + top + side + row) * pass->num_outputs + output;
                        copy(to, block + row * BLOCK, pass->num_outputs - output);
                    }
                }
            }
        }
    }
}

/* The pass down: rows of `row_bytes` bytes, to as many such rows as the pass has outputs. `narrow` is scratch: 32 bytes
   for every input of an output. */
VECTORIZED static void
down(const uint8_t *source, Py_ssize_t row_bytes, const Pass *pass, uint8_t *narrow, uint8_t *target) {
    for (Py_ssize_t output = 0; output < pass->num_outputs; output++) {
        const uint8_t *inputs = source + pass->first[output] * row_bytes;
        const int32_t *weights = pass->weights + output * pass->max_inputs;
        Py_ssize_t count = pass->count[output], byte = 0;
        for (; byte + LANES <= row_bytes; byte += LANES) {
            weigh(inputs + byte, row_bytes, weights, count, target + output * row_bytes + byte);
        }
        if (byte < row_bytes) {
            uint8_t last[LANES];
            for (Py_ssize_t index = 0; index < count; index++) {
                memcpy(narrow + index * LANES, inputs + index * row_bytes + byte, row_bytes - byte);
            }
            weigh(narrow, LANES, weights, count, last);
            memcpy(target + output * row_bytes + byte, last, row_bytes - byte);
        }
    }
}

/* Returns 0, or -1 if memory ran out. */
static int
resize(const uint8_t *source, Py_ssize_t source_height, Py_ssize_t source_width, Py_ssize_t pixel_bytes,
       uint8_t *planes, Py_ssize_t height, Py_ssize_t width, int down_first) {
    Pass rows = {0}, columns = {0};
    int failed = make_pass(&rows, source_width, width) || make_pass(&columns, source_height, height);
    Py_ssize_t between = down_first ? height * source_width * pixel_bytes : CHANNELS * source_height * width;
    uint8_t *image = malloc(between), *narrow = calloc(columns.max_inputs, LANES);
    uint8_t *bands = malloc((source_width * pixel_bytes + width + 2 * BLOCK) * LANES);
    if (failed || !image || !narrow || !bands) {
        failed = -1;
    } else {
        uint8_t *outputs = bands + (source_width * pixel_bytes + BLOCK) * LANES;
        if (down_first) {
            down(source, source_width * pixel_bytes, &columns, narrow, image);
            across(image, height, source_width, pixel_bytes, &rows, bands, outputs, planes);
        } else {
            across(source, source_height, source_width, pixel_bytes, &rows, bands, outputs, image);
            for (Py_ssize_t channel = 0; channel < CHANNELS; channel++) {
                uint8_t *plane = planes + channel * height * width;
                down(image + channel * source_height * width, width, &columns, narrow, plane);
            }
        }
    }
    free(image);
    free(narrow);
    free(bands);
    free_pass(&rows);
    free_pass(&columns);
    return failed;
}

/* The Arrow C data interface (https://arrow.apache.org/docs/format/CDataInterface.html), in which Pillow shows the
   memory of an image. */
struct ArrowArray {
    int64_t length, null_count, offset, n_buffers, n_children;
    const void **buffers;
    struct ArrowArray **children;
    struct ArrowArray *dictionary;
    void (*release)(struct ArrowArray *);
    void *private_data;
};

/* The memory of a source and its size in bytes; NULL with an exception if it is neither a buffer nor an image. */
static const uint8_t *
memory_of(PyObject *source, Py_buffer *view, Py_ssize_t *num_bytes) {
    if (!PyCapsule_CheckExact(source)) {
        if (PyObject_GetBuffer(source, view, PyBUF_SIMPLE)) {
            return NULL;
        }
        *num_bytes = view->len;
        return view->buf;
    }
    struct ArrowArray *array = PyCapsule_GetPointer(source, "arrow_array");
    if (array && (array->n_children != 1 || array->children[0]->n_buffers != 2 || array->children[0]->offset)) {
        PyErr_SetString(PyExc_ValueError, "the Arrow array is not an image with several channels");
        array = NULL;
    }
    if (!array) {
        return NULL;
    }
    *num_bytes = array->children[0]->length;
    return array->children[0]->buffers[1];
}

static PyObject *
resize_rgb(PyObject *module, PyObject *args) {
    PyObject *object;
    Py_ssize_t source_height, source_width, pixel_bytes, height, width, num_bytes = 0;
    Py_buffer view = {0}, planes = {0};
    int down_first, failed = 0;
    if (!PyArg_ParseTuple(args, "O(nnn)w*(nn)p", &object, &source_height, &source_width, &pixel_bytes, &planes, &height,
                          &width, &down_first)) {
        return NULL;
    }
    const uint8_t *source = memory_of(object, &view, &num_bytes);
    Py_ssize_t sides[] = {source_height, source_width, height, width};
    int fits = pixel_bytes == 3 || pixel_bytes == 4;
    for (int side = 0; side < 4; side++) {
        fits = fits && 0 < sides[side] && sides[side] < 1 << 24;
    }
    if (source && !(fits && num_bytes == source_height * source_width * pixel_bytes &&
                    planes.len == CHANNELS * height * width)) {
        PyErr_SetString(PyExc_ValueError, "the sizes do not match the memory");
    } else if (source) {
        Py_BEGIN_ALLOW_THREADS
        failed = resize(source, source_height, source_width, pixel_bytes, planes.buf, height, width, down_first);
        Py_END_ALLOW_THREADS
        if (failed) {
            PyErr_NoMemory();
        }
    }
    PyBuffer_Release(&view);
    PyBuffer_Release(&planes);
    if (PyErr_Occurred()) {
        return NULL;
    }
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"resize", resize_rgb, METH_VARARGS,
     "resize(source, (source_height, source_width, pixel_bytes), planes, (height, width), down_first)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_bicubic", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC
PyInit__bicubic(void) {
    return PyModule_Create(&definition);
}
