// A SentencePiece model file: the pieces and the settings that decide ids. One pass over its protobuf records.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "bpe_tables.hpp"
#include "normalizer.hpp"
#include "utf8.hpp"

namespace cpt {

struct BpeModel {
  std::vector<Piece> pieces;
  bool byte_fallback = false;
  NormalizerSettings normalizer;
};

// The fields of one protobuf message, one after another; nested messages are bytes.
class MessageReader {
 public:
  explicit MessageReader(std::string_view data) : data_(data) {}

  // Moves to the next field; false at the end.
  bool next() {
    if (at_ == data_.size()) return false;
    const std::uint64_t key = varint();
    field_ = key >> 3;
    bytes_ = {};
    number_ = 0;
    is_number_ = (key & 7) == 0;
    if (is_number_) {
      number_ = varint();
      return true;
    }
    std::uint64_t size = 0;
    if ((key & 7) == 1) {
      size = 8;
    } else if ((key & 7) == 5) {
      size = 4;
    } else if ((key & 7) == 2) {
      size = varint();
    } else {
      throw std::invalid_argument("not a SentencePiece model: an unknown kind of record");
    }
    if (size > data_.size() - at_) throw std::invalid_argument("the model was cut short");
    bytes_ = data_.substr(at_, static_cast<std::size_t>(size));
    at_ += static_cast<std::size_t>(size);
    return true;
  }

  std::uint64_t field() const { return field_; }

  std::uint64_t number() const {
    if (!is_number_) throw std::invalid_argument("a record stands where the model needs a number");
    return number_;
  }

  std::string_view bytes() const {
    if (is_number_) throw std::invalid_argument("a number stands where the model needs a record");
    return bytes_;
  }

 private:
  std::uint64_t varint() {
    std::uint64_t value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      if (at_ == data_.size()) throw std::invalid_argument("the model was cut short");
      const auto byte = static_cast<unsigned char>(data_[at_++]);
      value |= static_cast<std::uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return value;
    }
    throw std::invalid_argument("a number of the model has more than 64 bits");
  }

  std::string_view data_;
  std::size_t at_ = 0;
  std::uint64_t field_ = 0;
  std::uint64_t number_ = 0;
  std::string_view bytes_;
  bool is_number_ = false;
};

inline Piece read_piece(std::string_view record) {
  Piece piece{{}, 0.0F, PieceType::kNormal};
  for (MessageReader fields(record); fields.next();) {
    if (fields.field() == 1) {
      if (!utf8::valid(fields.bytes())) throw std::invalid_argument("a piece of the model is not valid UTF-8");
      piece.text = std::string(fields.bytes());
    } else if (fields.field() == 2) {
      if (fields.bytes().size() != sizeof(float)) throw std::invalid_argument("the score of a piece is no float");
      std::uint32_t bits = 0;
      for (std::size_t k = sizeof(bits); k-- > 0;) bits = bits << 8 | static_cast<unsigned char>(fields.bytes()[k]);
      std::memcpy(&piece.score, &bits, sizeof(bits));
    } else if (fields.field() == 3) {
      if (fields.number() < 1 || fields.number() > 6) throw std::invalid_argument("a piece of an unknown type");
      piece.type = static_cast<PieceType>(fields.number());
    }
  }
  if (piece.type == PieceType::kByte) {
    const std::string_view text = piece.text;
    const bool sound = text.size() == 6 && text.substr(0, 3) == "<0x" && text[5] == '>' &&
                       text.find_first_not_of("0123456789ABCDEF", 3) == 5;
    if (!sound) throw std::invalid_argument("a byte piece of the model is not spelt like <0x0A>");
  }
  return piece;
}

// The model in a file's bytes; where a setting is named twice, the later one holds.
// Throws std::invalid_argument where it is damaged, or not BPE.
inline BpeModel read_bpe_model(std::string_view data) {
  constexpr std::uint64_t kUnigram = 1;
  constexpr std::uint64_t kBpe = 2;
  BpeModel model;
  std::uint64_t type = kUnigram;
  for (MessageReader records(data); records.next();) {
    if (records.field() == 1) {
      model.pieces.push_back(read_piece(records.bytes()));
    } else if (records.field() == 2) {  // trainer_spec
      for (MessageReader fields(records.bytes()); fields.next();) {
        if (fields.field() == 3) type = fields.number();
        if (fields.field() == 24) model.normalizer.whitespace_as_suffix = fields.number() != 0;
        if (fields.field() == 35) model.byte_fallback = fields.number() != 0;
      }
    } else if (records.field() == 3) {  // normalizer_spec
      for (MessageReader fields(records.bytes()); fields.next();) {
        if (fields.field() == 2) model.normalizer.charsmap = std::string(fields.bytes());
        if (fields.field() == 3) model.normalizer.add_dummy_prefix = fields.number() != 0;
        if (fields.field() == 4) model.normalizer.remove_extra_whitespaces = fields.number() != 0;
        if (fields.field() == 5) model.normalizer.escape_whitespaces = fields.number() != 0;
      }
    }
  }
  if (model.pieces.empty()) throw std::invalid_argument("the model holds no piece");
  if (type != kBpe) throw std::invalid_argument("a SentencePiece model of type " + std::to_string(type) + ", not BPE");
  return model;
}

}  // namespace cpt
