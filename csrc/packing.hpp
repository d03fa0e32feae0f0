// Samples of a fixed number of predictions: packing pieces of documents into them, and copying one out of a stream.
//
// A prediction is a pair of neighbours of one document, (token, next token), numbered by the place of its token. A
// document of L tokens has L - 1 of them.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace cpt {

constexpr std::int64_t kIgnored = -100;  // label of a position that is not scored

// The set of 0..size-1 in 64-way summary bits: insert, erase and "smallest member >= x" in O(log_64 size).
class NumberSet {
 public:
  explicit NumberSet(std::size_t size) {
    do {
      size = (size + 63) / 64;
      levels_.emplace_back(size, 0);
    } while (size > 1);
  }

  void insert(std::size_t x) {
    for (auto& level : levels_) {
      level[x / 64] |= std::uint64_t{1} << (x % 64);
      x /= 64;
    }
  }

  void erase(std::size_t x) {
    for (auto& level : levels_) {
      level[x / 64] &= ~(std::uint64_t{1} << (x % 64));
      x /= 64;
      if (level[x] != 0) return;
    }
  }

  // The smallest member >= x, or -1.
  std::int64_t at_least(std::size_t x) const {
    for (std::size_t depth = 0; depth < levels_.size(); ++depth) {
      const auto& level = levels_[depth];
      if (x / 64 >= level.size()) return -1;
      if (const std::uint64_t above = level[x / 64] >> (x % 64); above != 0) {
        x += lowest(above);
        while (depth-- > 0) x = x * 64 + lowest(levels_[depth][x]);
        return static_cast<std::int64_t>(x);
      }
      x = x / 64 + 1;
    }
    return -1;
  }

 private:
  static std::size_t lowest(std::uint64_t bits) {
    std::size_t number = 0;
    for (std::size_t width = 32; width > 0; width /= 2)
      if ((bits & ((std::uint64_t{1} << width) - 1)) == 0) {
        bits >>= width;
        number += width;
      }
    return number;
  }

  std::vector<std::vector<std::uint64_t>> levels_;
};

// Best-fit decreasing over lengths 1..capacity: the longest pieces first, each into the fullest bin that holds it.
//
// Pieces of one length are interchangeable, so only their number counts: `histogram[n]` pieces of length n give the
// bin of each piece in the order of falling length. It may end at the longest piece that there is, and more room than
// all pieces take changes nothing. O(pieces * log capacity) time, 4 bytes a piece, 8 a bin and 4.2 a position of
// min(capacity, sum of the lengths).
struct Packing {
  std::vector<std::uint32_t> bin_of;      // pieces by falling length
  std::vector<std::uint32_t> bin_pieces;  // pieces of each bin

  Packing(const std::vector<std::int64_t>& histogram, std::int64_t most) {
    std::int64_t pieces = 0;
    std::int64_t taken = 0;
    for (std::size_t length = 1; length < histogram.size(); ++length) {
      pieces += histogram[length];
      taken += histogram[length] * static_cast<std::int64_t>(length);
    }
    const auto capacity = static_cast<std::size_t>(std::min(most, taken));
    if (pieces > kMost) throw std::invalid_argument(std::to_string(pieces) + " pieces, more than 2^32 - 2");
    bin_of.reserve(static_cast<std::size_t>(pieces));
    std::vector<std::uint32_t> newest(capacity + 1, kNone);  // by room left: the bin last seen with it ...
    std::vector<std::uint32_t> next;                         // ... and for each bin the one before it
    NumberSet rooms(capacity + 1);
    for (std::size_t length = histogram.size() - 1; length > 0; --length) {
      for (std::int64_t k = 0; k < histogram[length]; ++k) {
        std::int64_t room = rooms.at_least(length);
        std::uint32_t bin = 0;
        if (room < 0) {
          bin = static_cast<std::uint32_t>(bin_pieces.size());
          bin_pieces.push_back(0);
          next.push_back(kNone);
          room = static_cast<std::int64_t>(capacity);
        } else {
          const auto r = static_cast<std::size_t>(room);
          bin = newest[r];
          newest[r] = next[bin];
          if (newest[r] == kNone) rooms.erase(r);
        }
        ++bin_pieces[bin];
        bin_of.push_back(bin);
        const std::size_t left = static_cast<std::size_t>(room) - length;
        if (left == 0) continue;
        if (newest[left] == kNone) rooms.insert(left);
        next[bin] = newest[left];
        newest[left] = bin;
      }
    }
  }

 private:
  static constexpr std::uint32_t kNone = 0xffffffff;
  static constexpr std::int64_t kMost = 0xfffffffe;
};

// The pieces of a document: as many of `capacity` predictions as there are, then the rest.
template <typename Visit>
void for_each_piece(const std::int64_t* starts, std::size_t documents, std::int64_t capacity, Visit visit) {
  for (std::size_t d = 0; d < documents; ++d)
    for (std::int64_t first = starts[d]; first + 1 < starts[d + 1]; first += capacity)
      visit(first, std::min(capacity, starts[d + 1] - 1 - first));
}

// The token at a place of a stream. Throws std::range_error where the vocabulary has no such id.
template <typename Token>
std::int64_t checked_token(const Token* stream, std::int64_t at, std::int64_t vocab_size) {
  const auto token = static_cast<std::int64_t>(stream[at]);
  if (token < 0 || token >= vocab_size)
    throw std::range_error("token id " + std::to_string(token) + " at token " + std::to_string(at));
  return token;
}

// Copies one sample: pieces of predictions one after another, then padding (token 0, not scored).
//
// At a document's start d inside of a piece the prediction d - 1 -> d is not scored, and a new stretch begins; so one
// does at each piece and at the padding.
class SampleWriter {
 public:
  SampleWriter(std::int64_t* tokens, std::int64_t* labels, std::int64_t length, std::int64_t vocab_size)
      : tokens_(tokens), labels_(labels), length_(length), vocab_size_(vocab_size) {}

  // Predictions first..first+count-1; `document` points to the first document start behind `first`, `end` behind all.
  template <typename Token>
  void add(const Token* stream, std::int64_t first, std::int64_t count, const std::int64_t* document,
           const std::int64_t* end) {
    starts.push_back(filled_);
    std::int64_t token = checked_token(stream, first, vocab_size_);
    for (std::int64_t k = 0; k < count; ++k) {
      tokens_[filled_ + k] = token;
      token = checked_token(stream, first + k + 1, vocab_size_);
      labels_[filled_ + k] = token;
    }
    for (; document != end && *document <= first + count; ++document) {
      const std::int64_t at = filled_ + (*document - first);
      labels_[at - 1] = kIgnored;
      if (at < filled_ + count && at > starts.back()) starts.push_back(at);
    }
    filled_ += count;
  }

  void pad() {
    if (filled_ == length_) return;
    starts.push_back(filled_);
    std::fill(tokens_ + filled_, tokens_ + length_, 0);
    std::fill(labels_ + filled_, labels_ + length_, kIgnored);
  }

  std::vector<std::int64_t> starts;

 private:
  std::int64_t* tokens_;
  std::int64_t* labels_;
  std::int64_t length_;
  std::int64_t vocab_size_;
  std::int64_t filled_ = 0;
};

}  // namespace cpt
